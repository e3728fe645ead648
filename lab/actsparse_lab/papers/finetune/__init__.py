"""Trained models finetuned for sparsity, beside plain finetuning."""
