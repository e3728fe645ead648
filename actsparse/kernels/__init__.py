"""Sparse execution: the same results as the dense MLP, without the products that zeros save."""

from __future__ import annotations

from actsparse.kernels.accelerated import Accelerated, accelerate
from actsparse.kernels.mlp import Prepared, prepare, sparse_mlp

__all__ = ["Accelerated", "Prepared", "accelerate", "prepare", "sparse_mlp"]
