"""What zero derivatives spare the backward pass, and what dropping small gradients costs."""
