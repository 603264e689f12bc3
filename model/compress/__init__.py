"""One file per family of compression methods."""
