"""Corpora, tokenizers, shards, batches."""
