"""``measure``: the active door. It makes its own passes over a model, in eval mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actsparse.blocks.block import MLPBlock, base_layer, unwrap
from actsparse.blocks.find import find_mlp_blocks
from actsparse.observe.curvature import gauss_newton_trace, hessian_trace, top_eigenvalue
from actsparse.observe.curvature_product import LossSurface
from actsparse.observe.gradients import Weighing
from actsparse.observe.loss import LossFn, Reduction, draw_labels, sample_losses
from actsparse.observe.session import Names, Seen, blocks_of, options_of, table_of
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
    (see :mod:`actsparse.observe.loss`).

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
            is a mean.
        reduction: of a sample's loss over its positions; of a scalar it is not known.
        inputs, blocks: as in :func:`observe`; without both the first batch serves as inputs.
        parameters: names, for curvature; None: the weights of the MLP blocks' layers.
        probes: draws for every estimate that has no option of its own.
        mask: which tokens to count, as in :func:`observe`.
        seed: of all draws.
        progress: called with (measure, passes done, passes in all).

    Raises:
        ValueError: unknown measures or labels; a loss that is wrong or not enough; batches that
            can be read only once; no MLP block.
        ArithmeticError: a curvature is not finite.

    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> batches = [{"x": torch.randn(16, 8), "y": torch.randint(0, 8, (16,))}]
    >>> def loss_fn(model, batch):
    ...     return model(batch["x"]), batch["y"]
    >>> found = measure(mlp, loss_fn, batches, ["flatness", "hessian"], inputs=batches[0]["x"])
    >>> sorted(found.curvature), found.measures["samples"]
    (['hessian'], 16)
    """
    known = [*MEASURES, *CURVATURES]
    options = options_of(measures, known)
    if labels not in ("data", "model"):
        raise ValueError(f'labels must be "data" or "model", got {labels!r}')
    if probes < 2:
        raise ValueError(f"probes must be at least 2 for a standard error, got {probes}")
    found = _blocks(model, inputs, blocks, batches)
    chosen = list(parameters) if parameters is not None else _weights(model, found)
    passive = {name: given for name, given in options.items() if name in MEASURES}

    def told(name: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(name, done, total)

    curvature: dict[str, dict[str, Any]] = {}
    summary = None
    how: dict[str, Any] = {}
    if passive:
        draws = probes if labels == "model" else 1
        surface = LossSurface(model, loss_fn, batches, chosen, reduction, draws, told("passes"))
        summary = _passes(surface, found, passive, mask, labels, draws, seed)
        how = _how(surface)
    for name in options:
        if name in MEASURES:
            continue
        if name == "token_copies":
            given = {"probes": probes, **options[name]}
            surface = LossSurface(
                model, loss_fn, batches, chosen, reduction, given["probes"], told(name)
            )
            curvature[name] = _token_copies(surface, found, given["probes"], seed)
            how = _how(surface)
            continue
        run = {"gauss_newton": gauss_newton_trace, "hessian": hessian_trace}.get(name)
        given = {"probes": probes, **options[name]} if run else options[name]
        estimate = (run or top_eigenvalue)(
            model,
            loss_fn,
            batches,
            parameters=chosen,
            reduction=reduction,
            seed=seed,
            progress=told(name),
            **given,
        )
        curvature[name] = estimate.to_json()
        how = {key: curvature[name][key] for key in ("samples", "positions", "reduction")}
    how |= {"measures": list(options), "labels": labels, "seed": seed}
    how |= {"batches": len(batches), "parameters": chosen}  # type: ignore[arg-type]
    histograms = spectra_of(found) if "spectrum" in options else []
    return Measures(summary, curvature, histograms, how)


def spectra_of(blocks: Iterable[MLPBlock]) -> list[dict[str, Any]]:
    """The spectra of all blocks' layers as records hold them."""
    return [
        {"block": block.name, "layer": layer, **found.to_json()}
        for block in blocks
        for layer, found in spectra(block).items()
    ]


def _passes(
    surface: LossSurface,
    blocks: list[MLPBlock],
    options: dict[str, dict[str, Any]],
    mask: Mask | None,
    labels: Labels,
    draws: int,
    seed: int,
) -> dict[str, Any] | None:
    """The passive measures, over ``draws`` sweeps."""
    generator = _generator(surface, seed)
    weighing = Weighing("sum")
    values: list[dict[str, float]] = []
    with surface.still(), Seen(blocks, options, mask, weighing, always=True) as seen:
        for _ in range(draws):

            def visit(output: Any, samples: int) -> None:
                weighing.reduction = "mean" if isinstance(output, Tensor) else "sum"
                _backward(_loss(output, labels, surface.reduction, generator), seen)
                surface.tick()

            surface.sweep("gauss_newton" if labels == "model" else "hessian", visit)
            values.append(_flatness(seen.summary("inference")))
        summary = seen.summary("inference")
    if summary is None or labels == "data":
        return summary
    errors = {f"{key}_error": _error([v[key] for v in values]) for key in values[0]}
    repeated = {"samples", "tokens"} & summary.keys()
    rows = [
        row | {key: row[key] // draws for key in {"samples", "tokens"} & row.keys()}
        for row in summary["blocks"]
    ]
    whole = {key: summary[key] // draws for key in repeated}
    return summary | whole | errors | {"blocks": rows}


def _token_copies(
    surface: LossSurface, blocks: list[MLPBlock], probes: int, seed: int
) -> dict[str, Any]:
    """``tr G`` for copied MLP weights: the mean AF of drawn-label losses weighted by √w_bt."""
    generator = _generator(surface, seed)
    values: list[dict[str, float]] = []
    with (
        surface.still(),
        Seen(blocks, {"flatness": {}}, None, Weighing("sum"), always=True) as seen,
    ):
        for _ in range(probes):

            def visit(output: Any, samples: int) -> None:
                logits, weights = surface.predictions(output)
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
                with torch.enable_grad():
                    nats = nn.functional.cross_entropy(logits, drawn[:, 0], reduction="none")
                    _backward((nats * weights.sqrt()).sum(), seen)
                surface.tick()

            surface.sweep("gauss_newton", visit)
            values.append(_flatness(seen.summary("inference")))
    layers = [key for key in values[0] if key != "flatness"]
    totals = [math.fsum(value[key] for key in layers) for value in values]
    each = {key.removeprefix("flatness_"): values[-1][key] for key in layers}
    return {
        "value": totals[-1],
        "standard_error": _error(totals),
        "probes": probes,
        "by_layer": each,
        **_how(surface),
    }


def _loss(output: Any, labels: Labels, reduction: Reduction, generator: torch.Generator) -> Tensor:
    with torch.enable_grad():
        if isinstance(output, Tensor):
            return output
        logits, targets = output
        if labels == "model":
            targets = draw_labels(logits, targets, generator)
        return sample_losses(logits, targets, reduction).sum()


def _backward(loss: Tensor, seen: Seen) -> None:
    """Into the readings alone: no parameter's gradient is computed or touched."""
    leaves = seen.leaves("inference")
    if leaves:
        torch.autograd.backward(loss, inputs=leaves)


def _flatness(summary: dict[str, Any] | None) -> dict[str, float]:
    known = summary or {}
    return {key: known[key] for key in _FLATNESS if known.get(key) is not None}


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


def _blocks(
    model: nn.Module, inputs: Any, blocks: Iterable[MLPBlock] | None, batches: Iterable[Any]
) -> list[MLPBlock]:
    handle = unwrap(model).__dict__.get("_actsparse_handle")
    if inputs is not None or blocks is not None or handle is not None:
        return blocks_of(model, inputs, blocks)
    try:
        return list(find_mlp_blocks(model, next(iter(batches), None)))
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
