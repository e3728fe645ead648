"""A Transformer's MLP without the products that zeros make needless; results stay the same.

``y = φ(x Uᵀ + b) Vᵀ + b′``; gated: ``y = (φ(x Gᵀ + b_g) ⊙ (x Uᵀ + b)) Vᵀ + b′``. Of the six
products of a training step all but x Uᵀ have a sparse operand (arXiv 2605.25612), whose zeros are
skipped; ``screen=True`` skips most of x Uᵀ too, without changing a result (:func:`sparse_mlp`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from actsparse.activations import ActivationFunction, named
from actsparse.kernels import backends, dense, ops
from actsparse.kernels.cut import check_threshold, infer_cut, pack_cut
from actsparse.kernels.forms import FEW, Form, form_of
from actsparse.kernels.prepared import Prepared, laid, prepare
from actsparse.kernels.row_norms import row_norms


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
    threshold: Tensor | None = None,
    product: bool = False,
    prepared: Prepared | None = None,
    on_active: Callable[[int], None] | None = None,
    on_norms: Callable[[dict[str, Tensor]], None] | None = None,
) -> Tensor:
    """Compute an MLP from its weights and skip every product with a zero activation.

    ``y = φ(x Uᵀ + b) Vᵀ + b′``; gated: ``y = (φ(x Gᵀ + b_g) ⊙ (x Uᵀ + b)) Vᵀ + b′``.

    Float32 and bfloat16 on the CPU run the C++ kernels, with sums in float32; float32, bfloat16 and
    float16 on a GPU run the Triton kernels; anything else runs PyTorch's own operators. Autocast
    does not apply. A product with an
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
            summation, t is φ's threshold or 0; large entries of x count apart on the CPU). It saves
            time at low density. It works for the activations above that the kernels compute, and is
            ignored for others, where the C++ kernels are missing, and on a GPU with gradients or
            for more than 16 tokens.
        between: what stands between φ and down, such as dropout. It gets the packed values [nnz],
            so it must act on each by itself and keep zeros.
        threshold: a number t for each unit, float32 [H], at which any activation is cut: where
            ``|φ(z)| ≤ t`` the activation is 0, and the rows of up (in gated blocks) and of downᵀ
            are not read. It is compared with φ(z) as the dense layers compute it in the dtype of x.
            NaN is kept. There is no gradient of t. ``screen`` is ignored then. In gated blocks also
            [2, H]: the second row is compared with ``|φ(z) (x Uᵀ + b)|`` of what is kept.
        product: compare the whole activation ``|φ(z) (x Uᵀ + b)|`` of gated blocks with the
            threshold instead. It needs all of up.
        prepared: what :func:`prepare` returned, for weights that do not change between calls.
        on_active: called with the number of entries that were packed.
        on_norms: called with a dict of ‖a‖₁ and ‖a‖₂ of each token, ``l1`` and ``l2`` [..., 1],
            before ``between``; they have gradients. The gradient at a = 0 is 0, as for torch's
            norms, so units that are left out change nothing.

    Returns:
        y [..., D].

    Raises:
        ValueError: shapes or dtypes do not fit, the activation has no such name, or ``product``
            is given without a gate or a threshold.

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
                gate_bias=gate_bias, screen=screen, between=between, threshold=threshold,
                product=product, prepared=prepared, on_active=on_active, on_norms=on_norms,
            )  # fmt: skip
    if product and (gate is None or threshold is None):
        missing = "gate" if gate is None else "threshold"
        raise ValueError(f"product=True compares the product of a gated block; {missing} is None")
    name = activation if isinstance(activation, str) else activation.name
    form = form_of(name) if threshold is None else None
    function = named(activation) if isinstance(activation, str) else activation
    weights = (up, bias, down, down_bias, gate, gate_bias)
    if prepared is not None and prepared.gated != (gate is not None):
        made = "with a gate" if prepared.gated else "without a gate"
        raise ValueError(
            f"prepared was made {made}; give prepare(down, up, gate) what is given here"
        )
    plain = between is None and on_active is None and on_norms is None
    first, first_bias = (up, bias) if gate is None else (gate, gate_bias)
    second, second_bias = (None, None) if gate is None else (up, bias)
    if threshold is not None:
        threshold = threshold.detach()
        check_threshold(threshold, up, gate is not None and not product)
        if plain and backends.native(x, up) and not _learns(x, *weights):
            copies = prepare(down, up, gate) if prepared is None else prepared
            try:
                return infer_cut(
                    x, first, first_bias, second, second_bias, down, down_bias,
                    function, threshold, product, copies,
                )  # fmt: skip
            except RuntimeError:
                _check(x, *weights)
                raise
    if plain and form is not None and not _learns(x, *weights):
        if form.act is not None and backends.native(x, up):
            copies = prepare(down, up, gate) if prepared is None else prepared
            try:
                return infer(
                    x, first, first_bias, second, second_bias, down, down_bias, form, screen, copies
                )
            except RuntimeError:  # the kernels check, without names: decoding has no time for more
                _check(x, *weights)
                raise
        if x.shape[:-1].numel() <= FEW and backends.on_gpu(x, *weights):
            _check(x, *weights)
            copies = prepare(down, up, gate) if prepared is None else prepared
            return _decode(x, first_bias, down_bias, name, second_bias, screen, copies)
    _check(x, *weights)
    first, down = laid(first), laid(down)
    codes: tuple[Tensor, ...] = ()
    if screen and form is not None and backends.screens(first):
        codes = tuple(ops.quantise(first.detach())) if prepared is None else prepared.codes()
    tokens = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    if form is not None:
        pointer, index, value, _ = ops.pack(tokens, first, _flat(first_bias), list(codes), name)
    elif threshold is not None:
        pointer, index, value = pack_cut(
            tokens, first, first_bias, second, second_bias, function, threshold, product
        )
    else:
        with torch.no_grad():
            z = F.linear(tokens, first, first_bias)
            a, slope = function.value(z), function.derivative(z)
        pointer, index, value, _ = ops.pack_values(tokens, first, first_bias, a, slope)
    if on_active is not None:
        on_active(index.shape[0])
    if gate is not None and threshold is None:
        value = value * ops.sample(pointer, index, tokens, laid(up), bias)
    if on_norms is not None:
        one, two = (n.view(*x.shape[:-1], 1) for n in row_norms(pointer, value, tokens.shape[0]))
        on_norms({"l1": one, "l2": two})
    if between is not None:
        value = between(value)
    rows = None if prepared is None else prepared.rows()
    y = ops.project(pointer, index, value, down, rows, _flat(down_bias), tokens.shape[0])
    return y.view(*x.shape[:-1], down.shape[0])


def infer(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    second: Tensor | None,
    second_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    form: Form,
    screen: bool,
    copies: Prepared,
) -> Tensor:
    """One operator, no gradients; ``second``: up and its bias of gated blocks."""
    x = x.contiguous()
    up, codes, other, rows = copies.for_inference(x.shape[:-1].numel() <= FEW, screen)
    rest = (other, _flat(second_bias), rows, _flat(down_bias), down.shape[0], *form[:2])
    kernels = backends.compiled()
    if not codes:
        return kernels.forward(dense.linear(x, first, first_bias), None, x, *rest)
    return kernels.forward_screened(x, up, _flat(first_bias), *codes, *rest)


def _decode(
    x: Tensor,
    first_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    second_bias: Tensor | None,
    screen: bool,
    copies: Prepared,
) -> Tensor:
    """Few tokens on a GPU, no gradients; ``second_bias``: up's in gated blocks."""
    from actsparse.kernels.triton_decode import decode

    tokens = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    rows, few = copies.rows(), len(tokens)
    y = decode(
        tokens, copies.matrix("first", few), _flat(first_bias), rows, _flat(down_bias),
        activation, copies.matrix("second", few), _flat(second_bias),
        list(copies.codes()) if screen else [],
    )  # fmt: skip
    return y.view(*x.shape[:-1], rows.shape[1])


def _learns(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def _flat(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None else bias.contiguous()


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
