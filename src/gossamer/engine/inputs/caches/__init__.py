"""Caches of transformers whose keys a method evicts, chooses from, or compresses."""
