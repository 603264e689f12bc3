"""From a teacher to a compressed model, and out again."""
