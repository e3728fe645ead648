"""``measure``: measures that make passes of their own over a model, in eval mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from actsparse import html
from actsparse.blocks.block import MLPBlock, base_layer, on_meta
from actsparse.blocks.resolve import blocks_of, found_with, handle_on
from actsparse.blocks.trace import undisturbed
from actsparse.observe.backward_passes import Labels, correct_samples, how_of, observed
from actsparse.observe.curvature import gauss_newton_trace, hessian_trace, top_eigenvalue
from actsparse.observe.curvature_product import LossSurface
from actsparse.observe.gradient_measure import GradientMeasure
from actsparse.observe.loss import LossFn, Reduction, check_logits
from actsparse.observe.registry import MEASURES, Mask, Names, options_of
from actsparse.observe.show import html_of, text_of
from actsparse.observe.spectrum import spectra
from actsparse.observe.tables import table_of, table_of_rows
from actsparse.observe.token_copies import token_copies
from actsparse.observe.trials import TRIALS, On, Rows, ticking
from actsparse.values import checked_arguments

CURVATURE = ("curvature", "value", "±", "from")  # the columns of its table
CURVATURES = ("gauss_newton", "token_copies", "hessian", "top_eigenvalue")


@dataclass(frozen=True, repr=False)
class Measures:
    """What :func:`measure` found; print it for tables.

    Args:
        measures: what :meth:`Seen.summary` returns. Where labels were drawn it also has
            ``flatness…_error``, standard errors over draws. None if no such measure was asked for.
        curvature: by name, ``gauss_newton``, ``token_copies``, ``hessian`` and ``top_eigenvalue``,
            each as plain numbers; those that were asked for.
        spectra: the spectra of each layer, with histograms, if ``"spectrum"`` was asked for.
        how: on what data and with which settings it was measured.
        trials: by name, a row for everything that a trial tried.

    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> batch = {"x": torch.randn(16, 8), "y": torch.randint(0, 8, (16,))}
    >>> found = measure(mlp, lambda m, b: (m(b["x"]), b["y"]), [batch], inputs=batch["x"])
    >>> found.to_json()["measures"]["density"] == found.measures["density"]
    True
    >>> len(found.tables())  # density, flatness, gradient
    3
    """

    measures: dict[str, Any] | None
    curvature: dict[str, dict[str, Any]]
    spectra: list[dict[str, Any]]
    how: dict[str, Any]
    trials: dict[str, Rows] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values.

        Returns:
            Values by the names of the fields, for JSON.
        """
        return asdict(self)

    def tables(self) -> list[Any]:
        """Tables for the terminal: one for each measure, one for curvature, one for each trial.

        Returns:
            Tables of rich.
        """
        from rich.table import Table

        shown = [
            table_of(MEASURES[name].columns, {"inference": self.measures})
            for name in self.how["measures"]
            if name in MEASURES
        ]
        if self.curvature:
            table = Table(box=None, pad_edge=False, header_style="bold")
            for title in CURVATURE:
                table.add_column(
                    title, justify="left" if title in ("curvature", "from") else "right"
                )
            for cells in self._curvature_rows():
                table.add_row(*cells)
            shown.append(table)
        shown += [
            table_of_rows(name, rows, TRIALS[name].columns) for name, rows in self.trials.items()
        ]
        return shown

    def __str__(self) -> str:
        return text_of(self.tables())

    def __repr__(self) -> str:
        found = [*self.how["measures"]]
        return f"<Measures {', '.join(found)}: {self.how['samples']} samples>"

    def _repr_html_(self) -> str:
        shown = html_of(self.how["measures"], {"inference": self.measures})
        if self.curvature:
            shown += html.table(CURVATURE, self._curvature_rows(), "curvature")
        for name, rows in self.trials.items():
            columns = TRIALS[name].columns
            cells = [[row.get(column) for column in columns] for row in rows]
            shown += html.table(columns, cells, name)
        return shown

    def _curvature_rows(self) -> list[list[str]]:
        rows = []
        for name, found in self.curvature.items():
            error = found.get("standard_error", found.get("error_bound"))
            count = "probes" if "probes" in found else "products"
            value = [f"{found['value']:.4g}", f"{error:.2g}"]
            rows.append([name, *value, f"{found[count]} {count}"])
        return rows


def measure(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    measures: Names = ("density", "flatness", "gradient"),
    *,
    labels: Labels = "data",
    correct: bool = False,
    reduction: Reduction = "mean",
    inputs: Any = None,
    blocks: Iterable[MLPBlock] | None = None,
    parameters: Iterable[str] | None = None,
    probes: int = 10,
    mask: Mask | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Measures:
    """Measure a model on data, by passes of its own that leave no trace.

    The model runs in eval mode. Modes, gradients, ``requires_grad`` and global random numbers are
    afterwards as they were. Frozen models are measured like others. The loss is the mean over
    samples of per-sample losses (see :mod:`actsparse.observe.loss`). Samples that predict nothing
    count neither in the loss nor in flatness. ``docs/measures.md`` says what each number means.

    Args:
        model: any model, modified or not.
        loss_fn: ``loss_fn(model, batch)`` returns the pair (logits [B, ..., C], targets [B, ...]),
            −100 where nothing is predicted. For ``labels="data"`` without Gauss–Newton it may
            return a scalar instead, the mean over the batch's samples.
        batches: a list of batches, or a DataLoader.
        measures: names, or name → options.

            - those of :func:`observe`: ``"density"``, ``"flatness"``, ``"gradient"``, ``"noise"``,
              ``"spectrum"``;
            - curvature: ``"gauss_newton"``, ``"hessian"`` (traces), ``"top_eigenvalue"``, and
              ``"token_copies"``, the Gauss–Newton trace with a copy of the MLP weights for each
              token, which augmented flatness estimates (arXiv 2605.25612);
            - trials (:mod:`actsparse.observe.trials` has their options): ``"robustness"``, loss and
              accuracy under attacks on inputs and noise; ``"covering"``, how far weight noise
              covers an attack; ``"pruning"``, small effective gradients dropped. Sizes of attacks
              are in the inputs' own units, after any normalisation.

        labels: for measures of gradients: ``"data"``, the data's labels, or ``"model"``, labels
            drawn from softmax(logits) in ``probes`` draws. With ``"model"`` augmented flatness
            estimates the trace ``token_copies`` if a sample's loss is a sum over positions, and
            that trace / N if it is a mean over N. Gauss–Newton traces always draw; the Hessian and
            trials always take the data's.
        correct: measures of gradients count those samples alone that the model classifies
            correctly (at every predicted position), as the papers' augmented flatness does.
        reduction: of a sample's loss over its positions, ``"mean"`` or ``"sum"``; of a scalar it is
            not known. The losses of robustness are means.
        inputs, blocks: as for :func:`observe`; without both the first batch serves as inputs.
        parameters: names of parameters, for curvature; None: the weights of the MLP blocks' layers.
        probes: the number of draws for every estimate that has no option of its own.
        mask: which tokens count for density and covering, as for :func:`observe`.
        seed: of all draws.
        progress: called with (measure, passes done, passes in all); measures that share
            passes come under one name, ``"density, flatness"``.

    Returns:
        The measures; print them for tables.

    Raises:
        ValueError: unknown measures, options, labels or reduction; a loss that is wrong or not
            enough; batches that can be read only once; no MLP block; weights on 'meta'; inputs that
            cannot be attacked, such as token ids.
        ArithmeticError: a curvature, or a gradient of an attack, is not finite.

    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> batches = [{"x": torch.randn(16, 8), "y": torch.randint(0, 8, (16,))}]
    >>> def loss_fn(model, batch):
    ...     return model(batch["x"]), batch["y"]
    >>> found = measure(mlp, loss_fn, batches, ["flatness", "hessian"], inputs=batches[0]["x"])
    >>> sorted(found.curvature), found.measures["samples"]
    (['hessian'], 16)
    """
    options = checked_options(measures, probes)
    if not options:
        raise ValueError(f"measures is empty; known: {', '.join(sorted(_known()))}")
    if labels not in ("data", "model"):
        raise ValueError(f'labels must be "data" or "model", got {labels!r}')
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum" over positions, got {reduction!r}')
    if (reason := on_meta(model)) is not None:
        raise ValueError(f"measure needs the model's weights: {reason}")
    # says what is wrong with the batches before one is taken
    LossSurface(model, loss_fn, batches, dict(model.named_parameters()), reduction)
    with undisturbed(model):  # a loader draws its order
        first = next(iter(batches))
    found = _blocks(model, inputs, blocks, first)
    purposes = [name for name in options if name in _OF_LOGITS]
    purposes += ['labels="model"'] if labels == "model" else []
    purposes += ["correct=True"] if correct else []
    if purposes:
        with undisturbed(model), torch.enable_grad():
            check_logits(loss_fn(model, first), purposes[0], "loss_fn on batch 0")
    chosen = list(parameters) if parameters is not None else _weights(model, found)
    passive = {name: given for name, given in options.items() if name in MEASURES}

    def told(name: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(name, done, total)

    trials: dict[str, Rows] = {}
    for name in [name for name in options if name in TRIALS]:  # first, as not all inputs will do
        trial = TRIALS[name](**options[name])
        total = trial.passes() * len(batches)  # type: ignore[arg-type]
        calls = ticking(loss_fn, total, told(name))
        trials[name] = trial.rows(On(model, calls, batches, found, mask, reduction, seed))
    curvature: dict[str, dict[str, Any]] = {}
    summary = None
    histograms: list[dict[str, Any]] = []
    how: dict[str, Any] = {}
    if passive:
        draws = probes if labels == "model" and any(map(_of_gradients, passive)) else 1
        names = ", ".join(passive)  # they share their passes
        surface = LossSurface(model, loss_fn, batches, chosen, reduction, draws, told(names))
        right = correct_samples(surface) if correct else None
        summary, watched = observed(surface, found, passive, mask, labels, draws, seed, right)
        if "spectrum" in passive:
            histograms = spectra_of(watched, **passive["spectrum"])
        how = how_of(surface)
    for name in [name for name in options if name in CURVATURES]:
        given: dict[str, Any] = {
            "parameters": chosen,
            "reduction": reduction,
            "seed": seed,
            "progress": told(name),
        }
        given |= {} if name == "top_eigenvalue" else {"probes": probes}
        given |= {"blocks": found} if name == "token_copies" else {}
        estimate = _ESTIMATES[name](model, loss_fn, batches, **(given | options[name]))
        curvature[name] = estimate.to_json()
        how = {key: curvature[name][key] for key in ("samples", "positions", "reduction")}
    if not how:
        surface = LossSurface(model, loss_fn, batches, chosen, reduction)
        with surface.still():
            surface.sweep("hessian", lambda output, samples: None)
        how = how_of(surface)
    how |= {"measures": list(options), "labels": labels, "seed": seed}
    how |= {"correct": True} if correct else {}
    how |= {"batches": len(batches), "parameters": chosen}  # type: ignore[arg-type]
    return Measures(summary, curvature, histograms, how, trials)


def spectra_of(blocks: Mapping[str, MLPBlock], zero: float = 0.1) -> list[dict[str, Any]]:
    """The spectra (eigenvalues of W Wᵀ) of all layers of several blocks, for records.

    Args:
        blocks: blocks by name, as :attr:`Seen.blocks`.
        zero: below which size an eigenvalue counts as zero, as for
            :func:`actsparse.observe.spectrum.spectrum`.

    Returns:
        A row for each ``block`` and ``layer``, with numbers and histograms.

    >>> from actsparse import find_mlp_blocks
    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> blocks = find_mlp_blocks(mlp, torch.randn(2, 8))
    >>> [row["layer"] for row in spectra_of({"mlp": blocks[0]})]
    ['up', 'down']
    """
    return [
        {"block": name, "layer": layer, **found.to_json()}
        for name, block in blocks.items()
        for layer, found in spectra(block, zero).items()
    ]


_ESTIMATES: dict[str, Callable[..., Any]] = {
    "gauss_newton": gauss_newton_trace,
    "token_copies": token_copies,
    "hessian": hessian_trace,
    "top_eigenvalue": top_eigenvalue,
}
_OF_LOGITS = ("gauss_newton", "token_copies", "robustness", "covering")
_OWN = "block blocks model loss_fn batches parameters reduction seed progress".split()


def _known() -> dict[str, Callable[..., Any]]:
    """All that can be measured now: others may add to `MEASURES` and `TRIALS`."""
    return {**MEASURES, **_ESTIMATES, **TRIALS}


def checked_options(measures: Names, probes: int = 10) -> dict[str, dict[str, Any]]:
    """Measures as :func:`measure` takes them, as name → options.

    Raises:
        ValueError: a name or an option that is not known, or a value that cannot be.

    >>> checked_options(["density", "hessian"])
    {'density': {}, 'hessian': {}}
    """
    measured = _known()
    options = options_of(measures, measured)
    for name, given in options.items():
        known = [key for key in inspect.signature(measured[name]).parameters if key not in _OWN]
        for key in given:
            if key not in known:
                raise ValueError(
                    f"{name} has no option {key!r}; known: {', '.join(known) or 'none'}"
                )
        checked_arguments(measured[name], given, name)
        if name in TRIALS:
            try:
                TRIALS[name](**given)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            continue
        least = 4 if given.get("method") == "hutch++" else 2
        if (count := given.get("probes", probes)) < least:
            raise ValueError(f"probes must be at least {least} for a standard error, got {count}")
    return options


def within_bounds(measures: Names, info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Measures as name → options, attacks within the ``bounds`` of the data that ``info`` is of.

    >>> within_bounds(["density", "covering"], {"bounds": [0, 1]})
    {'density': {}, 'covering': {'bounds': [0, 1]}}
    """
    attacks = ("robustness", "covering")
    return {
        name: {"bounds": info.get("bounds"), **own} if name in attacks else own
        for name, own in checked_options(measures).items()
    }


def _of_gradients(name: str) -> bool:
    return issubclass(MEASURES[name], GradientMeasure)


def _blocks(
    model: nn.Module, inputs: Any, blocks: Iterable[MLPBlock] | None, first: Any
) -> list[MLPBlock]:
    if inputs is not None or blocks is not None or handle_on(model) is not None:
        return blocks_of(model, inputs, blocks, "measure")
    try:
        return list(found_with(model, first, "measure", stacklevel=4))
    except TypeError as error:
        raise ValueError(
            f"{type(model).__name__} does not run on a batch ({error}); give measure inputs= or "
            f"blocks= (from find_mlp_blocks)"
        ) from error


def _weights(model: nn.Module, blocks: list[MLPBlock]) -> list[str]:
    """Names of the weights of the blocks' layers, each once."""
    layers = [layer for b in blocks for layer in (b.gate, b.up, b.down) if layer is not None]
    wanted = {id(base_layer(layer.module).weight) for layer in layers}
    return [name for name, parameter in model.named_parameters() if id(parameter) in wanted]
