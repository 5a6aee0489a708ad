"""Sparse training: masked weights, compressed weights, rounds, and the training loop."""
