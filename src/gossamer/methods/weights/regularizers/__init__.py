"""Regularisers: terms that push whole groups to zero while the model trains."""
