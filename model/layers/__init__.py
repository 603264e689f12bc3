"""Modules that replace a weight matrix."""
