"""Sparse training inside other libraries' loops, one file each, imported only when asked for."""
