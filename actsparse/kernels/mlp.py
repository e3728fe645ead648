"""A Transformer's MLP without the products that zeros make needless; results stay the same.

``y = φ(x Uᵀ + b) Vᵀ + b′``; gated: ``y = (φ(x Gᵀ + b_g) ⊙ (x Uᵀ + b)) Vᵀ + b′``. Of the six
products of a training step all but x Uᵀ have a sparse operand (arXiv 2605.25612), whose zeros are
skipped; ``screen=True`` skips most of x Uᵀ too, without changing a result (:func:`sparse_mlp`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actsparse.activations import ActivationFunction, named
from actsparse.kernels import backends, ops
from actsparse.kernels.forms import FEW, Form, form_of
from actsparse.kernels.row_norms import row_norms


@dataclass(frozen=True)
class Prepared:
    """Copies of weights for :func:`sparse_mlp` that need not be made at each call.

    :func:`prepare` makes them.

    Args:
        rows: downᵀ [H, D], contiguous.
        first: the matrix that is screened [H, D], contiguous: gate in gated blocks, else up; None
            where nothing is screened.
        codes: what :func:`ops.quantise` (on a GPU :func:`triton_decode.quantise`) returns for
            ``first``; empty where nothing is screened.

    >>> prepare(torch.ones(2, 3)).rows.shape
    torch.Size([3, 2])
    """

    rows: Tensor
    first: Tensor | None = None
    codes: tuple[Tensor, ...] = ()


@torch.no_grad()
def prepare(down: Tensor, up: Tensor | None = None, *, screen: bool = True) -> Prepared:
    """Copy weights into the layout that :func:`sparse_mlp` reads fastest.

    The copies have the values of the weights now: prepare again when a weight has changed.

    Args:
        down: the weight of down [D, H].
        up: the weight of up, or of gate in gated blocks [H, D].
        screen: also quantise ``up`` to int8 for the screen. Without it ``up`` is laid out by rows,
            which takes no copy if it is so already.

    Returns:
        The copies, for ``sparse_mlp(..., prepared=...)``.

    >>> prepare(torch.ones(2, 3)).rows.shape
    torch.Size([3, 2])
    """
    rows = _by_rows(down.t())
    if up is None:
        return Prepared(rows)
    gpu = backends.on_gpu(up)
    if screen and not gpu and not backends.screens(up):
        return Prepared(rows)
    first = _by_rows(up)
    if not screen:
        return Prepared(rows, first)
    if gpu:
        from actsparse.kernels import triton_decode

        return Prepared(rows, first, triton_decode.quantise(first))
    return Prepared(rows, first, tuple(ops.quantise(first)))


def sparse_mlp(
    x: Tensor,
    up: Tensor,
    bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None = None,
    *,
    activation: str | ActivationFunction = "relu",
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    screen: bool = False,
    between: Callable[[Tensor], Tensor] | None = None,
    prepared: Prepared | None = None,
    on_active: Callable[[int], None] | None = None,
    on_norms: Callable[[dict[str, Tensor]], None] | None = None,
) -> Tensor:
    """Compute an MLP from its weights and skip every product with a zero activation.

    ``y = φ(x Uᵀ + b) Vᵀ + b′``; gated: ``y = (φ(x Gᵀ + b_g) ⊙ (x Uᵀ + b)) Vᵀ + b′``.

    Float32 on the CPU runs the C++ kernels; float32, bfloat16 and float16 on a GPU run the Triton
    kernels; anything else runs PyTorch's own operators. Autocast does not apply. A product with an
    exact zero activation is skipped even if its partner is NaN or infinite. A NaN pre-activation
    counts as active. Gradients exist for x and every weight, but only of first order: second
    derivatives need the dense block.

    Args:
        x: the tokens [..., D].
        up: the weight of up [H, D], U above, laid out as ``nn.Linear`` has it, with any strides.
            The transpose of a Conv1D weight of Hugging Face fits too.
        bias: the bias of up [H], or None.
        down: the weight of down [D, H], V above.
        down_bias: the bias of down [D], or None.
        activation: a name of ``actsparse.activations``, or a function. ReLU, JSReLU and squared
            ReLU, with any numbers (``"relu(threshold=0.1)"``), are computed inside the kernels. For
            others φ and φ′ are computed densely, and packed where either is not zero.
        gate: the weight of gate [H, D], G above, of gated blocks.
        gate_bias: the bias of gate [H], or None.
        screen: skip units that an int8 product proves inactive. A unit is proved inactive if ``ẑ +
            b + ‖x‖‖u − û‖ + ‖x − x̂‖‖û‖ + γ(‖x‖‖u‖ + |b| + t) < t`` (Cauchy–Schwarz; x̂, û and ẑ
            are the int8 values and their product, γ bounds the rounding of float32 in any order of
            summation, t is φ's threshold or 0). It saves time at low density. It works for
            the activations above that the kernels compute, and is ignored for others, where the C++
            kernels are missing, and on a GPU with gradients or for more than 16 tokens.
        between: what stands between φ and down, such as dropout. It gets the packed values [nnz],
            so it must act on each by itself and keep zeros.
        prepared: what :func:`prepare` returned, for weights that do not change between calls.
        on_active: called with the number of entries that were packed.
        on_norms: called with a dict of ‖a‖₁ and ‖a‖₂ of each token, ``l1`` and ``l2`` [..., 1],
            before ``between``; they have gradients. The gradient at a = 0 is 0, as for torch's
            norms, so units that are left out change nothing.

    Returns:
        y [..., D].

    Raises:
        ValueError: shapes or dtypes do not fit, or the activation has no such name.

    >>> x, up, down = torch.ones(1, 2), torch.eye(3, 2) - 0.5, torch.ones(2, 3)
    >>> sparse_mlp(x, up, None, down)
    tensor([[0., 0.]])
    >>> sparse_mlp(x, up, torch.tensor([1.0, 0.0, 0.0]), down)
    tensor([[1., 1.]])
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return sparse_mlp(
                x, up, bias, down, down_bias, activation=activation, gate=gate,
                gate_bias=gate_bias, screen=screen, between=between, prepared=prepared,
                on_active=on_active, on_norms=on_norms,
            )  # fmt: skip
    name = activation if isinstance(activation, str) else activation.name
    form = form_of(name)
    bare = gate is None and between is None and on_active is None and on_norms is None
    native = x.dtype is torch.float32 and x.is_cpu and backends.loaded()
    weights = (up, bias, down, down_bias, gate, gate_bias)
    if bare and form is not None and form.act is not None and native and not _learns(x, *weights):
        try:
            return _infer(x, up, bias, down, down_bias, form, screen, prepared)
        except RuntimeError:  # the kernels check, without names: decoding has no time for Python
            _check(x, *weights)
            raise
    _check(x, *weights)
    first, first_bias = (up, bias) if gate is None else (gate, gate_bias)
    plain = between is None and on_active is None and on_norms is None
    few = x.shape[:-1].numel() <= FEW and form is not None and not _learns(x, *weights)
    if plain and few and backends.on_gpu(x, *weights):
        up_of_gated = (None, None) if gate is None else (up, bias)
        return _decode(x, first, first_bias, down, down_bias, name, up_of_gated, screen, prepared)
    rows = None if prepared is None else prepared.rows
    first, down = _laid(first), _laid(down)
    codes: tuple[Tensor, ...] = ()
    if screen and form is not None and backends.screens(first):
        if prepared is not None and prepared.codes:
            codes = prepared.codes
        else:
            codes = tuple(ops.quantise(first.detach()))
    tokens = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    if form is not None:
        entries = ops.pack(tokens, first, _flat(first_bias), list(codes), name)
    else:
        function = named(activation) if isinstance(activation, str) else activation
        with torch.no_grad():
            z = F.linear(tokens, first, first_bias)
            a, slope = function.value(z), function.derivative(z)
        entries = ops.pack_values(tokens, first, first_bias, a, slope)
    pointer, index, value, _ = entries
    if on_active is not None:
        on_active(index.shape[0])
    if gate is not None:
        value = value * ops.sample(pointer, index, tokens, _laid(up), bias)
    if on_norms is not None:
        one, two = (n.view(*x.shape[:-1], 1) for n in row_norms(pointer, value, tokens.shape[0]))
        on_norms({"l1": one, "l2": two})
    if between is not None:
        value = between(value)
    y = ops.project(pointer, index, value, down, rows, _flat(down_bias), tokens.shape[0])
    return y.view(*x.shape[:-1], down.shape[0])


def _infer(
    x: Tensor,
    up: Tensor,
    bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    form: Form,
    screen: bool,
    prepared: Prepared | None,
) -> Tensor:
    """One operator, no gradients."""
    if screen and (prepared is None or not prepared.codes):
        screen = backends.screens(up)
    if prepared is None or (screen and not prepared.codes):
        prepared = prepare(down, up if screen else None)
    kernels = torch.ops.actsparse_cpu
    if not screen:
        return kernels.forward(x @ up.t(), _flat(bias), prepared.rows, _flat(down_bias), *form[:2])
    return kernels.forward_screened(
        x.contiguous(), prepared.first, _flat(bias), *prepared.codes, prepared.rows,
        _flat(down_bias), *form[:2],
    )  # fmt: skip


def _decode(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    up: tuple[Tensor | None, Tensor | None],
    screen: bool,
    prepared: Prepared | None,
) -> Tensor:
    """Few tokens on a GPU, no gradients; ``up`` and its bias of gated blocks."""
    from actsparse.kernels.triton_decode import decode

    if prepared is None or (screen and not prepared.codes):
        prepared = prepare(down, first, screen=screen)
    first = first if prepared.first is None else prepared.first
    codes = list(prepared.codes) if screen else []
    tokens = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    second = None if up[0] is None else up[0].contiguous()
    y = decode(
        tokens, first.contiguous(), _flat(first_bias), prepared.rows, _flat(down_bias), activation,
        second, _flat(up[1]), codes,
    )  # fmt: skip
    return y.view(*x.shape[:-1], down.shape[0])


def _learns(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def _flat(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None else bias.contiguous()


def _laid(weight: Tensor) -> Tensor:
    """weight with its rows or its columns contiguous: itself, or a copy."""
    fits = weight.is_contiguous() or weight.t().is_contiguous()
    return weight if fits else weight.contiguous()


def _by_rows(weight: Tensor) -> Tensor:
    """weight's values with contiguous rows: itself, or a copy."""
    weight = weight.detach()
    return ops.turned(weight.t()) if weight.t().is_contiguous() else weight.contiguous()


def _check(
    x: Tensor,
    up: Tensor,
    bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
) -> None:
    (units, d_model), d_out = up.shape, down.shape[0]
    wanted: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("x", x, (*x.shape[:-1], d_model)),
        ("down", down, (d_out, units)),
        ("bias", bias, (units,)),
        ("down_bias", down_bias, (d_out,)),
        ("gate", gate, (units, d_model)),
        ("gate_bias", gate_bias, (units,)),
    ]
    for name, tensor, shape in wanted:
        if tensor is None or (tensor.shape == shape and tensor.dtype == up.dtype):
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; with up {list(up.shape)} and down "
                f"{list(down.shape)} it must be {list(shape)}"
            )
        raise ValueError(f"{name} is {tensor.dtype}; up is {up.dtype}, and all must be alike")
