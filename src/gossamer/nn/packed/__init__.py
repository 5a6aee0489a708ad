"""Layers that hold weights packed for the sparse kernels."""
