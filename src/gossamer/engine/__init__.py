"""Running models: calibration, pruning, evaluation and generation."""
