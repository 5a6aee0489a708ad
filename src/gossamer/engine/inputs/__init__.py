"""What becomes sparse per input: attention, and later activations."""
