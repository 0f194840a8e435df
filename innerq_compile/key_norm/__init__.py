"""The key norm in a model's weights: calibration, folding and its undoing."""
