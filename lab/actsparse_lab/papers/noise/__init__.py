"""Second moments of features and gradients, accumulated over training."""
