"""Many runs, planned."""
