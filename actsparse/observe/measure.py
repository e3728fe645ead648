"""``measure``: the active door. It makes its own passes over a model, in eval mode."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actsparse.blocks.block import MLPBlock, base_layer, unwrap
from actsparse.blocks.chosen import blocks_of
from actsparse.blocks.find import find_mlp_blocks
from actsparse.blocks.trace import undisturbed
from actsparse.observe.curvature import gauss_newton_trace, hessian_trace, top_eigenvalue
from actsparse.observe.curvature_product import LossSurface
from actsparse.observe.gradients import GradientMeasure, Weighing
from actsparse.observe.loss import LossFn, Reduction, check_logits, draw_labels, sample_losses
from actsparse.observe.session import Names, Seen, options_of, table_of
from actsparse.observe.spectrum import spectra
from actsparse.observe.watch import MEASURES, Mask

Labels = Literal["data", "model"]
CURVATURES = ("gauss_newton", "token_copies", "hessian", "top_eigenvalue")
_FLATNESS = ("flatness", "flatness_up", "flatness_gate", "flatness_down")


@dataclass(frozen=True)
class Measures:
    """What :func:`measure` found; print it for tables.

    ``measures`` is a summary as :meth:`Seen.summary` gives it, with ``flatness…_error``, standard
    errors over draws, where labels were drawn; None if none was asked for. ``curvature`` holds
    what was asked for of ``gauss_newton``, ``token_copies``, ``hessian`` and ``top_eigenvalue``,
    each as plain numbers; ``spectra``, where ``"spectrum"`` was asked for, those of each layer with
    histograms. ``how`` says on what and how.
    """

    measures: dict[str, Any] | None
    curvature: dict[str, dict[str, Any]]
    spectra: list[dict[str, Any]]
    how: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def tables(self) -> list[Any]:
        """Rich tables, one for each measure and one of curvature."""
        from rich.table import Table

        shown = [
            table_of(MEASURES[name].columns, {"inference": self.measures})
            for name in self.how["measures"]
            if name in MEASURES
        ]
        if self.curvature:
            table = Table(box=None, pad_edge=False, header_style="bold")
            for title in ("curvature", "value", "±", "from"):
                table.add_column(
                    title, justify="left" if title in ("curvature", "from") else "right"
                )
            for name, found in self.curvature.items():
                error = found.get("standard_error", found.get("error_bound"))
                count = "probes" if "probes" in found else "products"
                table.add_row(
                    name, f"{found['value']:.4g}", f"{error:.2g}", f"{found[count]} {count}"
                )
            shown.append(table)
        return shown

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            for table in self.tables():
                console.print(table)
        return capture.get().rstrip()


def measure(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    measures: Names = ("density", "flatness", "gradient"),
    *,
    labels: Labels = "data",
    reduction: Reduction = "mean",
    inputs: Any = None,
    blocks: Iterable[MLPBlock] | None = None,
    parameters: Iterable[str] | None = None,
    probes: int = 10,
    mask: Mask | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Measures:
    """Measure a model on ``batches``: passes of its own, in eval mode, that leave no trace.

    Modes, gradients, ``requires_grad`` and global random numbers are afterwards as they were.
    Frozen models are measured like others. The loss is the mean over samples of per-sample losses
    (see :mod:`actsparse.observe.loss`); samples that predict nothing do not count in it, nor in
    flatness.

    Args:
        model: any model, modified or not.
        loss_fn: ``loss_fn(model, batch)`` returns the pair (logits [B, ..., C], targets [B, ...]),
            −100 where nothing is predicted; or a scalar, the mean over the batch's samples, which
            is enough for ``labels="data"`` without Gauss–Newton.
        batches: a list of batches, or a DataLoader.
        measures: names, or name → options. Those of :func:`observe`: ``"density"``,
            ``"flatness"``, ``"gradient"``, ``"noise"``, ``"spectrum"``; and of curvature:
            ``"gauss_newton"``, ``"hessian"`` (traces), ``"top_eigenvalue"``, and
            ``"token_copies"``, the Gauss–Newton trace when each token has its own copy of the MLP
            weights, which augmented flatness is an estimate of (arXiv 2605.25612).
        labels: of the measures of gradients: the data's, or drawn from softmax(logits), in
            ``probes`` draws. Under ``"model"`` augmented flatness estimates the trace
            ``token_copies`` where a sample's loss is a sum over positions, that trace / N where it
            is a mean over N. Curvature does not ask: Gauss–Newton traces always draw, the Hessian
            takes the data's.
        reduction: of a sample's loss over its positions; of a scalar it is not known.
        inputs, blocks: as in :func:`observe`; without both the first batch serves as inputs.
        parameters: names, for curvature; None: the weights of the MLP blocks' layers.
        probes: draws for every estimate that has no option of its own.
        mask: which tokens the passive measures count, as in :func:`observe`.
        seed: of all draws.
        progress: called with (measure, passes done, passes in all).

    Raises:
        ValueError: unknown measures, options, labels or reduction; a loss that is wrong or not
            enough; batches that can be read only once; no MLP block.
        ArithmeticError: a curvature is not finite.

    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> batches = [{"x": torch.randn(16, 8), "y": torch.randint(0, 8, (16,))}]
    >>> def loss_fn(model, batch):
    ...     return model(batch["x"]), batch["y"]
    >>> found = measure(mlp, loss_fn, batches, ["flatness", "hessian"], inputs=batches[0]["x"])
    >>> sorted(found.curvature), found.measures["samples"]
    (['hessian'], 16)
    """
    options = options_of(measures, [*MEASURES, *CURVATURES])
    if not options:
        raise ValueError(f"measures is empty; known: {', '.join(sorted([*MEASURES, *CURVATURES]))}")
    for name, given in options.items():
        _check_options(name, given, probes)
    if labels not in ("data", "model"):
        raise ValueError(f'labels must be "data" or "model", got {labels!r}')
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum" over positions, got {reduction!r}')
    # says what is wrong with the batches before one is taken
    LossSurface(model, loss_fn, batches, dict(model.named_parameters()), reduction)
    with undisturbed(model):  # a loader draws its order
        first = next(iter(batches))
    found = _blocks(model, inputs, blocks, first)
    purposes = [name for name in options if name in ("gauss_newton", "token_copies")]
    purposes += ['labels="model"'] if labels == "model" else []
    if purposes:
        with undisturbed(model), torch.enable_grad():
            check_logits(loss_fn(model, first), purposes[0], "loss_fn on batch 0")
    chosen = list(parameters) if parameters is not None else _weights(model, found)
    passive = {name: given for name, given in options.items() if name in MEASURES}

    def told(name: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(name, done, total)

    curvature: dict[str, dict[str, Any]] = {}
    summary = None
    histograms: list[dict[str, Any]] = []
    how: dict[str, Any] = {}
    if passive:
        draws = probes if labels == "model" and any(map(_of_gradients, passive)) else 1
        surface = LossSurface(model, loss_fn, batches, chosen, reduction, draws, told("passes"))
        summary, watched = _passes(surface, found, passive, mask, labels, draws, seed)
        if "spectrum" in passive:
            histograms = spectra_of(watched, **passive["spectrum"])
        how = _how(surface)
    for name in [name for name in options if name not in MEASURES]:
        given = {"parameters": chosen, "reduction": reduction, "seed": seed, "progress": told(name)}
        given |= {} if name == "top_eigenvalue" else {"probes": probes}
        given |= {"blocks": found} if name == "token_copies" else {}
        estimate = _ESTIMATES[name](model, loss_fn, batches, **(given | options[name]))
        curvature[name] = estimate.to_json()
        how = {key: curvature[name][key] for key in ("samples", "positions", "reduction")}
    how |= {"measures": list(options), "labels": labels, "seed": seed}
    how |= {"batches": len(batches), "parameters": chosen}  # type: ignore[arg-type]
    return Measures(summary, curvature, histograms, how)


def spectra_of(blocks: Mapping[str, MLPBlock], zero: float = 0.1) -> list[dict[str, Any]]:
    """The spectra of all layers of ``blocks``, as :attr:`Seen.blocks` names them, for records.

    ``zero`` as in :func:`actsparse.observe.spectrum.spectrum`.
    """
    return [
        {"block": name, "layer": layer, **found.to_json()}
        for name, block in blocks.items()
        for layer, found in spectra(block, zero).items()
    ]


def _passes(
    surface: LossSurface,
    blocks: list[MLPBlock],
    options: dict[str, dict[str, Any]],
    mask: Mask | None,
    labels: Labels,
    draws: int,
    seed: int,
) -> tuple[dict[str, Any] | None, dict[str, MLPBlock]]:
    """The passive measures, over ``draws`` sweeps, and the blocks as they are called there."""
    generator = _generator(surface, seed)
    values: list[dict[str, float]] = []
    rows: list[int] = []
    with surface.still(), Seen(blocks, options, mask, Weighing("sum"), always=True) as seen:
        for _ in range(draws):

            def visit(output: Any, samples: int) -> None:
                _backward(_loss(output, samples, labels, surface.reduction, generator), seen)
                rows.append(samples if isinstance(output, Tensor) else len(output[1]))
                surface.tick()

            surface.sweep("gauss_newton" if labels == "model" else "hessian", visit)
            draw = len(values) + 1
            values.append(_flatness(_per_draw(seen.summary("inference"), draw, rows, surface)))
    summary = seen.summary("inference")
    if summary is None:
        return None, seen.blocks
    found = _per_draw(summary, draws, rows, surface)
    found["blocks"] = [_per_draw(row, draws, rows, surface) for row in summary["blocks"]]
    if labels == "model":
        found |= {f"{key}_error": _error([v[key] for v in values]) for key in values[0]}
    return found, seen.blocks


def _token_copies(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    blocks: list[MLPBlock],
    parameters: Iterable[str],
    reduction: Reduction,
    probes: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> _Copies:
    """``tr G`` for copied MLP weights: the mean AF of drawn-label losses weighted by √w_bt."""
    surface = LossSurface(model, loss_fn, batches, parameters, reduction, probes, progress)
    generator = _generator(surface, seed)
    values: list[dict[str, float]] = []
    rows: list[int] = []
    weighing = Weighing("sum")
    with surface.still(), Seen(blocks, {"flatness": {}}, None, weighing, always=True) as seen:
        for _ in range(probes):

            def visit(output: Any, samples: int) -> None:
                logits, weights = surface.predictions(output)
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
                with torch.enable_grad():
                    nats = nn.functional.cross_entropy(logits, drawn[:, 0], reduction="none")
                    _backward((nats * weights.sqrt()).sum(), seen)
                rows.append(len(output[1]))
                surface.tick()

            surface.sweep("gauss_newton", visit)
            draw = len(values) + 1
            values.append(_flatness(_per_draw(seen.summary("inference"), draw, rows, surface)))
    grads = [leaf.grad for leaf in seen.leaves("inference") if leaf.grad is not None]
    if any(grad[-1] for grad in grads):  # passes skipped
        raise ArithmeticError("a gradient of token_copies is NaN or infinite")
    layers = [key for key in values[0] if key != "flatness"]
    totals = [math.fsum(value[key] for key in layers) for value in values]
    each = {key.removeprefix("flatness_"): values[-1][key] for key in layers}
    return _Copies(totals[-1], _error(totals), probes, each, **_how(surface))


@dataclass(frozen=True)
class _Copies:
    """As :class:`actsparse.observe.curvature.Trace`, split by the layers' roles."""

    value: float
    standard_error: float
    probes: int
    by_layer: dict[str, float]
    samples: int
    positions: float | None
    reduction: Reduction | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _loss(
    output: Any, samples: int, labels: Labels, reduction: Reduction, generator: torch.Generator
) -> Tensor:
    """The sum of a batch's per-sample losses."""
    with torch.enable_grad():
        if isinstance(output, Tensor):
            return output * samples
        logits, targets = output
        if labels == "model":
            targets = draw_labels(logits, targets, generator)
        return sample_losses(logits, targets, reduction).sum()


def _backward(loss: Tensor, seen: Seen) -> None:
    """Into the readings alone: no parameter's gradient is computed or touched."""
    leaves = seen.leaves("inference")
    if leaves:
        torch.autograd.backward(loss, inputs=leaves)


def _per_draw(
    summary: dict[str, Any] | None, draws: int, rows: list[int], surface: LossSurface
) -> dict[str, Any]:
    """Of ``draws`` draws as if of one, with means over samples over those that predict anything.

    ``rows`` counts the samples of each pass, also those that predict nothing.
    """
    known = dict(summary or {})
    share = sum(rows) / (draws * surface.samples)
    for key in (*_FLATNESS, "tokens_per_sample"):
        if known.get(key) is not None:
            known[key] *= share
    if "samples" in known:
        known["samples"] = round(known["samples"] / (share * draws))
    if "tokens" in known:
        known["tokens"] //= draws
    return known


def _flatness(summary: dict[str, Any]) -> dict[str, float]:
    return {key: summary[key] for key in _FLATNESS if summary.get(key) is not None}


def _error(running: list[float]) -> float:
    """Standard error of the last of ``running`` means over 1, 2, … draws."""
    draws = len(running)
    sums = [0.0, *(count * mean for count, mean in enumerate(running, start=1))]
    each = torch.tensor(sums, dtype=torch.float64).diff()
    return float(each.std()) / math.sqrt(draws)


def _how(surface: LossSurface) -> dict[str, Any]:
    predicted = surface.predicted / surface.samples if surface.predicted else None
    return {
        "samples": surface.samples,
        "positions": predicted,
        "reduction": surface.reduction if surface.predicted else None,
    }


def _generator(surface: LossSurface, seed: int) -> torch.Generator:
    return torch.Generator(surface.chosen[0].device).manual_seed(seed)


_ESTIMATES: dict[str, Callable[..., Any]] = {
    "gauss_newton": gauss_newton_trace,
    "token_copies": _token_copies,
    "hessian": hessian_trace,
    "top_eigenvalue": top_eigenvalue,
}
_OWN = "block blocks model loss_fn batches parameters reduction seed progress".split()


def _check_options(name: str, given: Mapping[str, Any], probes: int) -> None:
    parameters = inspect.signature((_ESTIMATES | MEASURES)[name]).parameters
    known = [key for key in parameters if key not in _OWN]
    for key in given:
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}; known: {', '.join(known) or 'none'}")
    least = 4 if given.get("method") == "hutch++" else 2
    if (count := given.get("probes", probes)) < least:
        raise ValueError(f"probes must be at least {least} for a standard error, got {count}")


def _of_gradients(name: str) -> bool:
    return issubclass(MEASURES[name], GradientMeasure)


def _blocks(
    model: nn.Module, inputs: Any, blocks: Iterable[MLPBlock] | None, first: Any
) -> list[MLPBlock]:
    handle = unwrap(model).__dict__.get("_actsparse_handle")
    if inputs is not None or blocks is not None or handle is not None:
        return blocks_of(model, inputs, blocks, "measure")
    try:
        return list(find_mlp_blocks(model, first))
    except TypeError as error:
        raise ValueError(
            f"a batch is not what {type(model).__name__} runs on ({error}); give measure inputs= "
            f"or blocks= (from find_mlp_blocks)"
        ) from error


def _weights(model: nn.Module, blocks: list[MLPBlock]) -> list[str]:
    """Names of the weights of the blocks' layers, each once."""
    layers = [layer for b in blocks for layer in (b.gate, b.up, b.down) if layer is not None]
    wanted = {id(base_layer(layer.module).weight) for layer in layers}
    return [name for name, parameter in model.named_parameters() if id(parameter) in wanted]
