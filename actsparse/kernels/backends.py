"""Which kernels take which tensors: the compiled ones, Triton's, or PyTorch's own operators."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from actsparse.kernels import checks

CPU = (torch.float32, torch.bfloat16)  # what the compiled kernels are made for


def loaded() -> bool:
    """Whether the compiled kernels are there; the first call builds and loads them."""
    return _load()


# what torch.compiler.assume_constant_result sets; that imports the whole compiler, a second
loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _load() -> bool:
    from actsparse.kernels import build  # here, so that `python -m` can run that module

    if not build.load():
        return False
    # inference is one operator without autograd, so that decoding does not pay for Python
    for name in ("forward", "forward_screened"):
        checks.fake(f"actsparse_cpu::{name}")(
            lambda x, *others: x.new_empty(*x.shape[:-1], others[-3])
        )
    checks.fake("actsparse_cpu::cut")(lambda v, _: torch.empty_like(v))
    checks.fake("actsparse_cpu::linear")(lambda x, up, _: x.new_empty(*x.shape[:-1], up.shape[0]))
    return True


def native(*tensors: Tensor | None) -> bool:
    """Whether the compiled kernels take these tensors: of one dtype, on the CPU."""
    if not loaded():
        return False
    dtype = None
    for t in tensors:
        if t is None:
            continue
        if dtype is None:
            dtype = t.dtype
            if dtype not in CPU:
                return False
        if t.dtype is not dtype or not t.is_cpu or t.layout is not torch.strided:
            return False
    return True


def on_gpu(*tensors: Tensor | None) -> bool:
    """Whether the Triton kernels take these tensors."""
    return all(t is None or (t.is_cuda and t.dtype in _DTYPES) for t in tensors) and _triton()


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _triton() -> bool:
    """Whether Triton is installed; PyTorch for CUDA brings it."""
    return find_spec("triton") is not None


_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


def screens(up: Tensor) -> bool:
    """Whether the screen takes this matrix: sums of 2¹⁶ products of codes fit 32 bits, not more."""
    return native(up) and up.shape[1] <= 1 << 16


def compiled() -> Any:
    """The compiled kernels as operators, where :func:`native` says that they are there."""
    return torch.ops.actsparse_cpu
