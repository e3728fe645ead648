"""Curvature of a loss, times a vector: exact products with its Hessian and Gauss–Newton matrix.

Of the loss L(θ), the mean over all samples of all batches, at chosen parameters θ:

    ``Hessian       ∂²L/∂θ²``
    ``Gauss–Newton  G = (1/B) Σ_b Σ_t w_bt J_btᵀ (diag(p_bt) − p_bt p_btᵀ) J_bt``

with J_bt the Jacobian of the logits at position t of sample b, p_bt their softmax and w_bt the
weight of the position in the sample's loss (:mod:`actsparse.observe.loss`). G is the Hessian
without the curvature of the logits, has no negative eigenvalue, and is for cross-entropy the Fisher
information (Schraudolph 2002, *Fast curvature matrix-vector products*; Martens 2020, JMLR 21:146).

The model runs in eval mode. Modes, ``requires_grad``, ``.grad`` and torch's global random numbers
are afterwards as they were, also after an error or an interrupt. Attention runs by its plain
formula (``SDPBackend.MATH``), because the fused kernels have no second derivative. What
:func:`actsparse.observe` watches on the model sees these passes too: close it first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from actsparse.observe.loss import (
    IGNORE,
    LossFn,
    Reduction,
    check_logits,
    check_loss,
    position_weights,
    predicted_logits,
    sample_losses,
)

Matrix = Literal["hessian", "gauss_newton"]
Progress = Callable[[int, int], None]
_SMALL = 2**18  # parameters; below, an operation's overhead is more than its arithmetic
_TOGETHER = 64
Product = Callable[[list[Tensor]], list[Tensor]]


class LossSurface:
    """The mean loss over all samples of ``batches``, as a function of chosen parameters.

    ``samples`` is their number B and ``predicted`` that of all their predicted positions, 0 where
    losses are scalars; both are of the last sweep.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Any],
        parameters: Iterable[str] | None,
        reduction: Reduction,
        vectors: int = 1,
        progress: Progress | None = None,
    ) -> None:
        try:
            count = len(batches)  # type: ignore[arg-type]
        except TypeError:
            raise ValueError(
                f"batches must be a list, or a DataLoader with a length, which can be read again "
                f"for every product; got {type(batches).__name__}: list(batches) makes a list of it"
            ) from None
        if not count or isinstance(batches, Tensor | Mapping):
            raise ValueError(
                f"batches must be a list of at least one batch, got "
                f"{'an empty' if not count else 'a'} {type(batches).__name__}"
            )
        named = dict(model.named_parameters(remove_duplicate=False))
        if parameters is None:
            parameters = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parameters: dict[str, nn.Parameter] = {}
        for name in parameters:
            if name not in named:
                raise ValueError(f"no parameter of the model is called {name!r:.80}")
            self.parameters[name] = named[name]
        if not self.parameters:
            raise ValueError("no parameters: none is named, or none of the model needs gradients")
        self.chosen = list(self.parameters.values())
        if len({id(p) for p in self.chosen}) < len(self.chosen):
            raise ValueError(
                f"parameters must name a tied tensor once, got all of {list(self.parameters)}"
            )
        self.model, self.loss_fn, self.batches = model, loss_fn, batches
        self.reduction: Reduction = reduction
        self.progress, self.done, self.total = progress, 0, vectors * count
        self.samples = self.predicted = self.batch = 0
        self.dtype = torch.float32
        for p in self.chosen:
            self.dtype = torch.promote_types(self.dtype, p.dtype)
        # how many vectors to push through one backward pass
        size = sum(p.numel() for p in model.parameters())
        self.together = min(max(_SMALL // size, 1), _TOGETHER)

    @contextmanager
    def still(self) -> Iterator[None]:
        """Eval mode, and gradients for the chosen parameters alone; undone at the end."""
        modes = [(module, module.training) for module in self.model.modules()]
        needs = [(p, p.requires_grad) for p in self.model.parameters()]
        wanted = {id(p) for p in self.chosen}
        try:
            for module, _ in modes:
                module.training = False
            for p, _ in needs:
                p.requires_grad_(id(p) in wanted)
            with torch.inference_mode(False), torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training
            for p, needed in needs:
                p.requires_grad_(needed)

    def sweep(self, matrix: Matrix, visit: Callable[[Any, int], None]) -> None:
        """Run the model on each batch; ``visit`` what its loss function returned, of B samples.

        Every sweep starts from the same random state, so that a loader that shuffles, or a model
        that draws, does so alike in all.
        """
        self.samples = self.predicted = 0
        devices = {p.device for p in self.model.parameters() if p.device.type != "cpu"}
        kind = next((device.type for device in devices), "cuda")
        with (
            torch.random.fork_rng([device.index for device in devices], device_type=kind),
            sdpa_kernel(SDPBackend.MATH),
        ):
            for index, batch in enumerate(self.batches):
                self.batch = index
                output, samples = self.run(matrix, batch)
                self.samples += samples
                visit(output, samples)

    def run(self, matrix: Matrix, batch: Any) -> tuple[Any, int]:
        """What the loss function returns for a batch, checked, and of how many samples."""
        where = f"loss_fn on batch {self.batch}"
        with torch.enable_grad():
            output = self.loss_fn(self.model, batch)
        if matrix == "gauss_newton":
            output = check_logits(output, "Gauss–Newton", where)
        else:
            output = check_loss(output, where)
        if not (output if isinstance(output, Tensor) else output[0]).requires_grad:
            raise ValueError(
                f"{where} returned a result that depends on no chosen parameter: they are unused, "
                f"or it was detached or computed under no_grad"
            )
        if isinstance(output, Tensor):
            samples = _length(batch)
            if samples is None:
                raise ValueError(
                    f"{where} returned a scalar, and the batch holds no tensor whose length tells "
                    f"its number of samples; return the pair (logits, targets)"
                )
            return output, samples
        counts = (output[1] != IGNORE).reshape(len(output[1]), -1).sum(1)
        self.predicted += int(counts.sum())
        return output, int((counts > 0).sum())

    def multiply(self, matrix: Matrix, vectors: Tensor) -> Tensor:
        """The matrix times each of the ``vectors`` [K, P], in one sweep: [K, P]."""
        total = torch.zeros_like(vectors)

        def visit(output: Any, samples: int) -> None:
            product = self.product(matrix, output, samples)
            for some, into in zip(
                vectors.split(self.together), total.split(self.together), strict=True
            ):
                into += self.flat(product(self.split(some)))
                self.tick(len(some))
            self.checked(total)

        self.sweep(matrix, visit)
        return total / self.samples

    def product(self, matrix: Matrix, output: Any, samples: int) -> Product:
        """One batch's part of the matrix, not yet divided by B, as a function of K vectors."""
        if matrix == "gauss_newton":
            return _gauss_newton(*self.predictions(output), self.chosen)
        with torch.enable_grad():
            if isinstance(output, Tensor):
                loss = output * samples
            else:
                loss = sample_losses(output[0], output[1], self.reduction).sum()
                check_loss(loss, f"loss_fn on batch {self.batch}")
            return _hessian(loss, self.chosen)

    def predictions(self, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [N, C] and weights [N] of a batch's predicted positions."""
        with torch.enable_grad():
            logits = predicted_logits(*output)
        return logits, position_weights(output[1], self.reduction, logits.dtype)

    def checked(self, values: Tensor) -> Tensor:
        """``values``, or ArithmeticError, naming the batch, if any is NaN or infinite."""
        if not values.isfinite().all():
            raise ArithmeticError(
                f"the curvature of batch {self.batch} is NaN or infinite: a number overflows, or a "
                f"derivative does not exist there (a square root or norm at 0)"
            )
        return values

    def tick(self, vectors: int = 1) -> None:
        """Report the products of some more vectors with one batch."""
        self.done += vectors
        if self.progress is not None:
            self.progress(self.done, self.total)

    def zeros(self) -> Tensor:
        """A vector [P] over all chosen parameters, in float32 or wider."""
        size = sum(p.numel() for p in self.chosen)
        return torch.zeros(size, dtype=self.dtype, device=self.chosen[0].device)

    def flat(self, parts: list[Tensor]) -> Tensor:
        """K tensors for each parameter as vectors [K, P]."""
        device = self.chosen[0].device
        return torch.cat([p.reshape(len(p), -1).to(device, self.dtype) for p in parts], dim=1)

    def split(self, vectors: Tensor) -> list[Tensor]:
        """The inverse of :meth:`flat`, in each parameter's dtype and on its device."""
        pieces = vectors.split([p.numel() for p in self.chosen], dim=1)
        return [
            piece.reshape(-1, *p.shape).to(p) for piece, p in zip(pieces, self.chosen, strict=True)
        ]


def pull(outputs: list[Tensor], inputs: Sequence[Tensor], along: list[Tensor]) -> list[Tensor]:
    """Σ over outputs of Jᵀ times each of K vectors: [K, *input] for each input; graph kept.

    ``along`` holds [K, *output] for each output.
    """
    if len(along[0]) == 1:
        return [g[None] for g in _pull(outputs, inputs, [v[0] for v in along])]
    try:
        return _pull(outputs, inputs, along, many=True)
    except RuntimeError:  # an operation that torch cannot batch; an error of its own comes again
        each = [_pull(outputs, inputs, list(vs)) for vs in zip(*along, strict=True)]
        return [torch.stack(parts) for parts in zip(*each, strict=True)]


def _pull(
    outputs: list[Tensor],
    inputs: Sequence[Tensor],
    along: list[Tensor],
    again: bool = False,
    many: bool = False,
) -> list[Tensor]:
    live = [(o, v) for o, v in zip(outputs, along, strict=True) if o.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if live:  # nothing is, in the second derivative of what is linear
        found = torch.autograd.grad(
            [o for o, _ in live],
            inputs,
            [v for _, v in live],
            retain_graph=True,
            create_graph=again,
            allow_unused=True,
            is_grads_batched=many,
        )
    lead = along[0].shape[:1] if many else ()
    return [
        i.new_zeros((*lead, *i.shape)) if g is None else g
        for g, i in zip(found, inputs, strict=True)
    ]


def _hessian(loss: Tensor, parameters: list[nn.Parameter]) -> Product:
    slope = _pull([loss], parameters, [torch.ones_like(loss)], again=True)
    return lambda vectors: pull(slope, parameters, vectors)


def _gauss_newton(logits: Tensor, weights: Tensor, parameters: list[nn.Parameter]) -> Product:
    p = logits.detach().softmax(-1)
    u = torch.zeros_like(p).requires_grad_()
    with torch.enable_grad():
        pulled = _pull([logits], parameters, [u], again=True)

    def product(vectors: list[Tensor]) -> list[Tensor]:
        (pushed,) = pull(pulled, [u], vectors)
        curved = p * (pushed - (p * pushed).sum(-1, keepdim=True))
        return pull([logits], parameters, [weights[:, None] * curved])

    return product


def _length(batch: Any) -> int | None:
    """How long the first tensor in a batch is: a tensor, or tuples, lists and dicts of them."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if not isinstance(batch, tuple | list):
        return None
    return next((n for n in map(_length, batch) if n), None)
