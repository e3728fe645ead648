"""The theory's measures as numbers: how far the identity held, and each arm's over its seeds.

Training and result lines hold what was seen in passing; ``measures.json`` beside a record, written
by `actsparse measure`, holds what passes over the trained model found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from actsparse.values import Name, Rule
from actsparse_lab.analysis.comparison import Comparison
from actsparse_lab.analysis.effects import number
from actsparse_lab.analysis.intervals import Estimate, t_interval
from actsparse_lab.analysis.manifest import read_checked
from actsparse_lab.records import Entry, RecordError, Run, run_measures_path

KEYS = (
    *("flatness", "flatness_up", "flatness_gate", "flatness_down"),
    *("coefficient", "density_from_flatness", "ratio"),
    *("input_norm", "activation_gradient", "effective_gradient", "down_input_norm"),
    *("gradient_sparsity", "gradient_l1", "gradient_l2", "participation", "concentration"),
    *("gradient_positive", "hidden_gradient"),
    *("feature_anisotropy", "gradient_anisotropy", "noise_scale"),
)
SPECTRUM = ("block", "layer", "bins", "counts", "marchenko_pastur")
HOW = ("data", "split", "samples", "positions", "labels", "reduction", "loss_reduction")
LAW = ("lower", "upper", "ks", "outliers", "below", "accepted")
_ESTIMATE = ({"value?": (float, None), "standard_error?": (float, None)}, None)
_SHAPE = {
    "kind": Literal["measures"],
    "schema": Annotated[
        int,
        Rule(
            "1, which this actsparse reads: upgrade it, or measure the run again",
            lambda schema: schema == 1,
        ),
    ],
    "how?": (dict[str, str | float | bool | list[Any] | dict[str, Any] | None], None),
    "measures?": (
        {
            **{f"{key}?": (float, None) for key in KEYS},
            "blocks?": ([{"block?": (Name, None)}], None),
        },
        None,
    ),
    "spectra?": ([dict], None),
    "curvature?": (
        {
            f"{name}?": _ESTIMATE
            for name in ("gauss_newton", "hessian", "token_copies", "top_eigenvalue")
        },
        None,
    ),
}


@dataclass(frozen=True)
class Identity:
    """How far ``AF / (T · H · c)`` was from derivative density in ``count`` pairs of the two.

    ``gap`` is the largest ``|AF / (T · H · c) / derivative density − 1|``, ``where`` says whose.
    ``skipped`` pairs are not compared: passes whose gradient was not finite have a part in their
    density, and none in their flatness.
    """

    gap: float
    where: str
    count: int
    skipped: int


@dataclass(frozen=True)
class Drawn:
    """A number that random draws estimate in each run.

    ``over_seeds`` is its mean with the interval of what differs between seeds; ``standard_error``
    is that of this mean over the draws alone, None where a run does not give its own.
    """

    over_seeds: Estimate
    standard_error: float | None


@dataclass(frozen=True)
class Measured:
    """An arm's measures over its finished seeds; None where no run has the number.

    ``training`` is the mean of the training lines in the last fifth of the steps. The rest is of
    the trained model: traces of the curvature of the loss, its largest eigenvalue, and augmented
    flatness, that of up, gate and down together, as in the trace of ``token_copies``.
    """

    arm: str
    training: dict[str, Estimate]
    seeds: int = 0  # of which the rest is known
    gauss_newton: Drawn | None = None
    hessian: Drawn | None = None
    token_copies: Drawn | None = None
    top_eigenvalue: Estimate | None = None
    flatness: Estimate | None = None

    @property
    def curved(self) -> bool:
        """Whether any number of the trained model is known."""
        return self != Measured(self.arm, self.training, self.seeds)


@dataclass(frozen=True)
class Theory:
    """What all runs say; ``how`` are the ways in which their trained models were measured."""

    task: str
    identity: Identity | None
    arms: tuple[Measured, ...]
    how: tuple[Entry, ...]


def theory_of(table: Comparison, runs: list[Run]) -> Theory | None:
    """The measures of a directory's runs; None where records hold none.

    Raises `RecordError` as `read_measures` does.
    """
    beside = [(run, read_measures(run) or _last(run)) for run in runs]
    arms = tuple(
        _measured(arm.name, [each for each in beside if each[0].arm == arm.name])
        for arm in table.arms
    )
    identity = _identity(beside)
    if identity is None and not any(arm.training or arm.curved for arm in arms):
        return None
    hows = [
        {key: value for key in HOW if (value := file["how"].get(key)) is not None}
        for run, file in beside
        if run.finished and file and file.get("how")
    ]
    return Theory(table.task, identity, arms, tuple({str(how): how for how in hows}.values()))


def read_measures(run: Run) -> Entry | None:
    """``measures.json`` beside a run's record; None where there is none.

    Every part of it but ``kind`` and ``schema`` is optional and may be null.

    Raises `RecordError`, naming the file, for one that cannot be read, is no such file or of
    another schema, belongs to another run, or holds something else where numbers should be.
    """
    path = run_measures_path(run.path.parent)
    entry = read_checked(path, _SHAPE)
    if entry is None:
        return None
    for key in ("task", "arm", "seed"):
        own = run.header[key]
        if entry.get(key, own) != own:
            raise RecordError(
                f"{path}: measured {key} {entry[key]!r}, but the record beside it is of {own!r}; "
                f"move it to its run, or measure this one"
            )
    return entry


def read_spectra(run: Run) -> list[Entry]:
    """The spectra of a run's weights that can be drawn, of its result or its ``measures.json``.

    Raises `RecordError` as `read_measures` does, and for a spectrum whose numbers are wrong.
    """
    path = run.path
    found = (run.result or {}).get("spectra")
    if not found and (file := read_measures(run)):
        path, found = run_measures_path(run.path.parent), file.get("spectra")
    whole = [
        entry
        for entry in found or []
        if isinstance(entry, dict) and all(entry.get(key) for key in SPECTRUM)
    ]
    for entry in whole:
        bins, counts, law = entry["bins"], entry["counts"], entry["marchenko_pastur"]
        fine = isinstance(bins, list) and isinstance(counts, list) and isinstance(law, dict)
        numbers = [*bins, *counts, *(law.get(key) for key in LAW)] if fine else []
        fine = fine and all(isinstance(each, int | float) for each in numbers)
        if not fine or len(bins) != len(counts) + 1:
            raise RecordError(
                f"{path}: the spectrum of {entry['layer']} in {entry['block']} needs lists of "
                f"numbers, counts and one more of bins, and of marchenko_pastur {', '.join(LAW)}"
            )
    return whole


def _last(run: Run) -> Entry | None:
    """What the run itself measured of its final model."""
    last = run.measured[-1] if run.measured else None
    return last if last and run.result and last["step"] == run.result["step"] else None


Beside = list[tuple[Run, Entry | None]]


def _measured(arm: str, beside: Beside) -> Measured:
    done = [(run, file) for run, file in beside if run.finished]
    files = [file for _, file in done]
    training = {key: t_interval(_late(run, key) for run, _ in done) for key in KEYS}
    return Measured(
        arm=arm,
        training={key: value for key, value in training.items() if value is not None},
        seeds=sum(file is not None for file in files),
        gauss_newton=_drawn(files, "gauss_newton"),
        hessian=_drawn(files, "hessian"),
        token_copies=_drawn(files, "token_copies"),
        top_eigenvalue=t_interval(
            number(file, "curvature", "top_eigenvalue", "value") for file in files
        ),
        flatness=t_interval(_flatness(file) for file in files),
    )


def _late(run: Run, key: str) -> float | None:
    """The mean over the training lines of the last fifth of the steps."""
    after = 0.8 * max((entry["step"] for entry in run.train), default=0)
    late = [number(entry["measures"], key) for entry in run.train if entry["step"] > after]
    mean = t_interval(late)
    return None if mean is None else mean.mean


def _drawn(files: list[Entry | None], name: str) -> Drawn | None:
    known = [file for file in files if number(file, "curvature", name, "value") is not None]
    mean = t_interval(number(file, "curvature", name, "value") for file in known)
    if mean is None:
        return None
    errors = [number(file, "curvature", name, "standard_error") for file in known]
    stated = [error for error in errors if error is not None]
    whole = len(stated) == len(known)
    return Drawn(mean, math.hypot(*stated) / len(known) if whole else None)


def _flatness(file: Entry | None) -> float | None:
    up, down = (number(file, "measures", f"flatness_{layer}") for layer in ("up", "down"))
    gate = number(file, "measures", "flatness_gate") or 0.0
    return None if up is None or down is None else up + gate + down


def _identity(beside: Beside) -> Identity | None:
    gaps: list[tuple[float, str]] = []
    skipped = 0
    for where, row in (pair for run, file in beside for pair in _rows(run, file)):
        found = number(row, "density_from_flatness")
        density = number(row, "derivative_density")
        if found is None or not density:
            continue
        if number(row, "skipped"):
            skipped += 1
        else:
            gaps.append((abs(found / density - 1), where))
    if not gaps:
        return None
    gap, where = max(gaps)
    return Identity(gap, where, len(gaps), skipped)


def _rows(run: Run, file: Entry | None) -> Iterator[tuple[str, Entry]]:
    """Everything measured in a run, of all blocks together and of each, and where."""
    lines = [(f"step {entry['step']}", entry["measures"]) for entry in (*run.train, *run.evals)]
    if run.result:
        lines += [("last fifth of training", run.result["training"])]
        lines += [("inference", run.result["inference"])]
    lines += [(f"step {entry['step']}, measured", entry["measures"]) for entry in run.measured]
    if file and file["kind"] == "measures":
        lines += [("measures.json", file.get("measures"))]
    for line, measures in lines:
        for row in [measures, *(measures.get("blocks") or [])] if measures else []:
            block = row.get("block")
            yield ", ".join([f"{run.arm} seed {run.seed}", line, *([block] if block else [])]), row
