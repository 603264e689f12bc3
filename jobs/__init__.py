"""One verb per file; each runs as `krony <verb>` and as `python -m jobs.<verb>`."""
