"""Tensors only: GPT-2, structured layers, their algebra, and the compression methods."""
