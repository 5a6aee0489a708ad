"""Solvers: choose the support and repair the kept weights together."""
