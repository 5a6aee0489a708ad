"""Layers that multiply only some of their inputs, chosen for each token."""
