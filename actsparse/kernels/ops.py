"""The products of a sparse MLP as PyTorch operators: compiled kernels, fakes and autograd.

Packed entries are three tensors (pointer, index, value) as :mod:`actsparse.kernels.pack` defines
them. Each operator runs the C++ kernels on float32 and bfloat16 CPU tensors where those are built,
Triton kernels on CUDA tensors, and PyTorch's own operators otherwise, with the same meaning: exact
zeros are skipped (:mod:`actsparse.kernels.reference`). Weights are contiguous by rows or columns.

What does not fit raises RuntimeError, whichever of them would run: the compiled kernels check for
themselves, and :mod:`actsparse.kernels.checks` does it before the others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from actsparse.activations import named
from actsparse.kernels import backends, checks, dense, reference
from actsparse.kernels import pack as packing
from actsparse.kernels.forms import form_of

GATHERED = 0.007  # density up to which, by docs/kernels.md, GPUs sample a product entry by entry

Four = tuple[Tensor, Tensor, Tensor, Tensor]


# ---- pack: x → z → the entries of φ(z), with their slopes ---------------------------------------


@custom_op("actsparse::pack", mutates_args=())
def pack(x: Tensor, up: Tensor, bias: Tensor | None, codes: list[Tensor], activation: str) -> Four:
    """φ(x upᵀ + bias), packed: pointer, index, value and slope φ′ of the active units.

    x [N, D], up [H, D], bias [H]; ``activation`` has a :class:`Form`; ``codes``, if any, from
    :func:`quantise`: units that they prove inactive are not computed. ``slope`` is empty where it
    is 1 (ReLU).
    """
    form, function = form_of(activation), named(activation)
    if form is None or len(codes) not in (0, 3):
        raise RuntimeError(
            "activation must be a form of ReLU, JSReLU or squared ReLU, and codes none or the 3 of "
            f"quantise; they are {activation!r} and {len(codes)} tensors"
        )
    if not codes or not backends.native(x, up, bias):
        checks.linear(x, up, bias)
    if backends.native(x, up, bias):
        how = (form.act or 0, form.floor)  # 0: ReLU, which is z above the floor
        if codes:
            entries = backends.compiled().screen(x, up, bias, *codes, *how)
        else:
            entries = backends.compiled().pack(dense.linear(x, up, bias), *how)
        if form.act is not None:
            return entries
        pointer, index, active, _ = entries
    elif backends.on_gpu(x, up, bias):
        from actsparse.kernels import triton_pack

        # in float32 Triton's products are no match for cuBLAS's
        fused = x.dtype is not torch.float32
        pointer, index, active = triton_pack.pack(x, up, bias, form.floor, fused)
    else:
        z = F.linear(x, up, bias)
        wide = z if z.dtype is torch.float64 else z.float()  # or the floor is rounded like z
        keep = ~(wide <= form.floor)
        (pointer, index), active = packing.pack(keep), z[keep]
    slope = x.new_empty(0) if form.ones else function.derivative(active)
    return pointer, index, function.value(active), slope


@checks.fake(pack)
def _(x: Tensor, up: Tensor, bias: Tensor | None, codes: list[Tensor], activation: str) -> Four:
    nnz = torch.library.get_ctx().new_dynamic_size()
    slope = x.new_empty(0 if (form := form_of(activation)) is not None and form.ones else nnz)
    return *_fake_entries(x, up, nnz), slope


@custom_op("actsparse::pack_values", mutates_args=())
def pack_values(x: Tensor, up: Tensor, bias: Tensor | None, a: Tensor, slope: Tensor) -> Four:
    """The entries of a = φ(z) and of φ′(z), both [N, H], where either is not zero.

    For activations whose two masks differ; x, up and bias say where gradients go.
    """
    sizes = checks.linear(x, up, bias)
    checks.require("a", a, sizes, x, x.dtype)
    checks.require("slope", slope, sizes, x, x.dtype)
    keep = (a != 0) | (slope != 0)
    pointer, index = packing.pack(keep)
    return pointer, index, a[keep], slope[keep]


@checks.fake(pack_values)
def _(x: Tensor, up: Tensor, bias: Tensor | None, a: Tensor, slope: Tensor) -> Four:
    nnz = torch.library.get_ctx().new_dynamic_size()
    return *_fake_entries(x, up, nnz), x.new_empty(nnz)


def _fake_entries(x: Tensor, up: Tensor, nnz: Any) -> tuple[Tensor, Tensor, Tensor]:
    segments = x.shape[0] * packing.blocks(up.shape[0])
    return (
        x.new_empty(segments + 1, dtype=torch.int64),
        x.new_empty(nnz, dtype=packing.index_type(up.shape[0], x.device)),
        x.new_empty(nnz),
    )


def _keep_pack(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    pointer, index, _, slope = output
    ctx.save_for_backward(inputs[0], inputs[1], pointer, index, slope)
    form = form_of(inputs[4]) if isinstance(inputs[4], str) else None
    ctx.ones = form is not None and form.ones
    ctx.list_length = len(inputs[3]) if isinstance(inputs[3], list) else None


def _pack_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    x, up, pointer, index, slope = ctx.saved_tensors
    grad = grads[2].contiguous()
    if not ctx.ones:
        grad = torch.where(slope != 0, grad * slope, 0)
    wanted = ctx.needs_input_grad[:3]
    dx, dup, dbias = _linear_gradients(wanted, pointer, index, grad, x, up)
    fourth = None if ctx.list_length is None else [None] * ctx.list_length
    return dx, dup, dbias, fourth, None


def _linear_gradients(
    wanted: tuple[bool, ...], pointer: Tensor, index: Tensor, grad: Tensor, x: Tensor, up: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, up and bias, as wanted, given those of the entries of x upᵀ + bias."""
    n, units = x.shape[0], up.shape[0]
    dx = dup = dbias = None
    if wanted[0]:
        dx = multiply(pointer, index, grad, up, None, n)
    if wanted[1] or wanted[2]:
        entries = by_unit(pointer, index, grad, n, units)
        if wanted[1]:
            dup = multiply(*entries, x, None, units, not up.is_contiguous())
        if wanted[2]:
            dbias = row_sums(entries[0], entries[2], units)
    return dx, dup, dbias


pack.register_autograd(_pack_backward, setup_context=_keep_pack)
pack_values.register_autograd(_pack_backward, setup_context=_keep_pack)


# ---- sample: the entries of x upᵀ + bias that a mask asks for -----------------------------------


@custom_op("actsparse::sample", mutates_args=())
def sample(pointer: Tensor, index: Tensor, x: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """``value[k] = ⟨x[row k], up[index k]⟩ + bias[index k]`` for packed entries: [nnz]."""
    return _sample(pointer, index, x, up, bias)


def _sample(pointer: Tensor, index: Tensor, x: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    if backends.native(x, up, bias):
        return backends.compiled().sample(pointer, index, x, up, bias)
    checks.entries(pointer, index, *checks.linear(x, up, bias), x)
    if backends.on_gpu(x, up, bias) and len(index) <= GATHERED * x.shape[0] * up.shape[0]:
        from actsparse.kernels import triton_products

        value = triton_products.sample(pointer, index, x, up)
    elif backends.on_gpu(x, up, bias) and x.dtype is not torch.float32:
        from actsparse.kernels import triton_pack

        value = triton_pack.sample_dense(pointer, index, x, up)
    else:
        row, column = packing.rows_of(pointer, x.shape[0], len(index)), index.long()
        value = (x @ up.t())[row, column]
    return value if bias is None else value + bias[index.long()]


@checks.fake(sample)
def _(pointer: Tensor, index: Tensor, x: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(index.shape[0])


def _keep_sample(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _sample_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    pointer, index, x, up = ctx.saved_tensors
    wanted = ctx.needs_input_grad[2:]
    return None, None, *_linear_gradients(wanted, pointer, index, grad.contiguous(), x, up)


sample.register_autograd(_sample_backward, setup_context=_keep_sample)


# ---- project: entries times the rows of V -------------------------------------------------------


@custom_op("actsparse::project", mutates_args=())
def project(
    pointer: Tensor,
    index: Tensor,
    value: Tensor,
    down: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    n: int,
) -> Tensor:
    """``y = a downᵀ + bias`` [N, D] for packed a [N, H] and down [D, H].

    ``rows``: a copy of downᵀ if there is one, in :func:`panels` for the compiled kernels; without
    it forward and backward each make their own, so that nothing of down's size is kept in between.
    """
    by_row = checks.rows_of(down, rows, value)
    return _multiply(pointer, index, value, by_row, bias, n, down.shape[0], False)


@checks.fake(project)
def _(
    pointer: Tensor,
    index: Tensor,
    value: Tensor,
    down: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    n: int,
) -> Tensor:
    return value.new_empty(n, down.shape[0])


def _keep_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pointer, index, value, down, rows, _, _ = inputs
    ctx.save_for_backward(pointer, index, value, down, rows)


def _project_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    pointer, index, value, down, rows = ctx.saved_tensors
    grad = grad.contiguous()
    grad_value = grad_down = None
    if ctx.needs_input_grad[2]:
        grad_value = sample(pointer, index, grad, down.t() if rows is None else rows, None)
    if ctx.needs_input_grad[3]:
        units = down.shape[1]
        entries = by_unit(pointer, index, value, grad.shape[0], units)
        grad_down = multiply(*entries, grad, None, units, down.is_contiguous()).t()
    bias = grad.sum(0) if ctx.needs_input_grad[5] else None
    return None, None, grad_value, grad_down, None, bias, None


project.register_autograd(_project_backward, setup_context=_keep_project)


# ---- what the gradients are made of -------------------------------------------------------------


@custom_op("actsparse::multiply", mutates_args=())
def multiply(
    pointer: Tensor,
    index: Tensor,
    value: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    n: int,
    turned: bool = False,
) -> Tensor:
    """``a rows + bias`` [N, M] of packed a [N, K] and rows [K, M]; exact zeros are skipped.

    ``turned``: lay the result out by columns, as a gradient of a weight that is laid out so.
    """
    _, d = checks.sizes_of("rows", rows)
    return _multiply(pointer, index, value, rows, bias, n, d, turned)


def _multiply(
    pointer: Tensor,
    index: Tensor,
    value: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    n: int,
    d: int,
    turned: bool,
) -> Tensor:
    if backends.native(value, rows, bias):
        out = backends.compiled().multiply(pointer, index, value, rows, bias, n, d, turned)
        return out.t() if turned else out
    checks.product(pointer, index, value, rows, bias, n)
    if backends.on_gpu(value, rows, bias):
        from actsparse.kernels import triton_products

        return triton_products.multiply(pointer, index, value, rows, bias, n, turned)
    dense = packing.unpack(pointer, index, value, n, rows.shape[0])
    out = reference.product(dense, rows)
    out = out if bias is None else out + bias
    return out.t().contiguous().t() if turned else out


@checks.fake(multiply)
def _(
    pointer: Tensor,
    index: Tensor,
    value: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    n: int,
    turned: bool = False,
) -> Tensor:
    m = rows.shape[1]
    return value.new_empty(m, n).t() if turned else value.new_empty(n, m)


@custom_op("actsparse::by_unit", mutates_args=())
def by_unit(
    pointer: Tensor, index: Tensor, value: Tensor, n: int, units: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of the transpose of a packed [N, H]: its pointer, row numbers and values."""
    if backends.native(value):
        return backends.compiled().by_unit(pointer, index, value, n, units)
    checks.values(pointer, index, value, n, checks.count("units", units))
    return packing.by_unit(pointer, index, value, n, units)


@checks.fake(by_unit)
def _(
    pointer: Tensor, index: Tensor, value: Tensor, n: int, units: int
) -> tuple[Tensor, Tensor, Tensor]:
    segments = units * packing.blocks(n)
    row = torch.empty_like(index, dtype=torch.int32)
    return pointer.new_empty(segments + 1), row, torch.empty_like(value)


@custom_op("actsparse::row_sums", mutates_args=())
def row_sums(pointer: Tensor, value: Tensor, n: int) -> Tensor:
    """The sum of each of n rows of packed entries."""
    if backends.native(value):
        return backends.compiled().row_sums(pointer, value, n)
    checks.rows(pointer, value, n)
    if n == 0 or len(value) == 0:
        return value.new_zeros(n)
    rows = pointer[:: (len(pointer) - 1) // n]  # in one order, unlike index_add on a GPU
    return torch.segment_reduce(value.double(), "sum", offsets=rows).to(value.dtype)


@checks.fake(row_sums)
def _(pointer: Tensor, value: Tensor, n: int) -> Tensor:
    return value.new_empty(n)


@custom_op("actsparse::panels", mutates_args=())
def panels(matrix: Tensor) -> Tensor:
    """A copy of a matrix [N, D] as the compiled kernels gather from it: [⌈D / P⌉, N, P].

    P columns are 256 bytes; the last panel is filled with zeros.
    """
    if not backends.native(matrix):
        raise RuntimeError(_needs("matrix", matrix))
    return backends.compiled().panels(matrix)


@checks.fake(panels)
def _(matrix: Tensor) -> Tensor:
    wide = 256 // matrix.element_size()
    return matrix.new_empty(-(-matrix.shape[1] // wide), matrix.shape[0], wide)


def _needs(name: str, t: Tensor) -> str:
    found = f"{t.dtype} on {t.device}, kernels are {'there' if backends.loaded() else 'missing'}"
    return f"{name} must be float32 or bfloat16 on the CPU, with compiled kernels; it is {found}"


@custom_op("actsparse::quantise", mutates_args=())
def quantise(up: Tensor) -> list[Tensor]:
    """What the lossless screen needs of up [H, D]: int8 codes, their shifts, and error norms.

    Where :func:`screens` says so alone; elsewhere nothing is screened.
    """
    if not backends.native(up):
        raise RuntimeError(_needs("up", up))
    return list(backends.compiled().quantise(up))


@checks.fake(quantise)
def _(up: Tensor) -> list[Tensor]:
    units, channels = -(-up.shape[0] // 64) * 64, -(-up.shape[1] // 4) * 4
    return [
        up.new_empty(units, channels, dtype=torch.int8),
        up.new_empty(units, dtype=torch.int32),
        up.new_empty(4, units, dtype=torch.float32),
    ]
