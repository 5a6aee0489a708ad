"""Benchmarks behind `gossamer bench`: correctness first, then time, against what users have."""
