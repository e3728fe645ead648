"""Sparsity against learning rate and batch size: is more noise flatter, and flatter sparser?"""
