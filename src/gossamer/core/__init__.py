"""Patterns, selection, supports, results: what every other layer builds on."""
