"""Pruning a trained model: the plan, calibration, blocks in order, whole channels."""
