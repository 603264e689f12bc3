"""Named protocols and the code that measures them."""
