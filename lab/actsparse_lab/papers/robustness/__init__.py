"""Attacks and noise on inputs, features and weights, at checkpoints of training."""
