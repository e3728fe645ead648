"""Flatness over its coefficient, and density, during training."""
