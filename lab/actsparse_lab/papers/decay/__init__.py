"""The papers' recipe against the decay of norm scales over a whole training, Σ lr·decay."""
