"""The product of the sparse kernels, in plain PyTorch on dense tensors.

One operand is mostly exact zeros, and **a product with an exact zero of that operand is skipped,
even if its partner is NaN or infinite**; where dense arithmetic gives 0 · NaN = NaN, this gives 0.
NaN and infinities of entries that are computed spread as they do in dense arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product(sparse: Tensor, rows: Tensor) -> Tensor:
    """``sparse @ rows`` with the exact zeros of ``sparse`` skipped: [N, K] × [K, M] → [N, M].

    >>> product(torch.tensor([[0.0, 2.0]]), torch.tensor([[torch.nan], [3.0]]))
    tensor([[6.]])
    """
    finite = rows.isfinite().all(1)
    if bool(finite.all()):  # then 0 · partner is 0, and skipping it changes nothing
        return sparse @ rows
    out = sparse[:, finite] @ rows[finite]
    for k in (~finite).nonzero().flatten().tolist():
        out = out + torch.where(sparse[:, k, None] != 0, sparse[:, k, None] * rows[k], 0)
    return out
