"""Artifacts on disk or object storage."""
