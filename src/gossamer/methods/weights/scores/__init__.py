"""Scorers: a number per weight, low is removed."""
