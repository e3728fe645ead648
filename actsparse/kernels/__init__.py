"""Sparse execution: the same results as the dense MLP, without the products that zeros save."""

from __future__ import annotations

from actsparse.kernels.accelerated import Accelerated, accelerate
from actsparse.kernels.decoding import CertifiedDecoding
from actsparse.kernels.head import CertifiedHead
from actsparse.kernels.mlp import sparse_mlp
from actsparse.kernels.prepared import prepare

__all__ = [
    "Accelerated", "CertifiedDecoding", "CertifiedHead", "accelerate", "prepare", "sparse_mlp",
]  # fmt: skip
