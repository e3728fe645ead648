"""Activation functions that are zero in one place and their derivatives in another."""
