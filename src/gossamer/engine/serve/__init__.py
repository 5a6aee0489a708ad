"""Serving: packed layers for a model, decoding, generation."""
