"""Training with noise on the weights: flatness and density."""
