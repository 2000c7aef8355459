"""Text to tokens to batches: calibration and distillation data, and text that a model writes."""
