"""Pure functions of matrices, in float64, with no idea of GPT-2."""
