"""What pruning and thresholds left of trained models: ``slim.json`` of `actsparse bench slim`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from actsparse.values import Above0, Count, Name, Share, check
from actsparse_lab.analysis.intervals import Estimate, Factor, factor, t_interval
from actsparse_lab.analysis.manifest import read_checked
from actsparse_lab.analysis.numbers import NONE, amount, change, quality, ratio
from actsparse_lab.analysis.prose import sections
from actsparse_lab.analysis.tables import Column, Table, markdown
from actsparse_lab.record_schema import Entry

SLIM = "slim.json"
TITLE = "Pruned, and with thresholds"
WORDS = {
    "trained": "as trained", "pruned": "pruned", "thresholds": "thresholds",
    "both": "pruned, thresholds",
}  # fmt: skip
SLIM_RULE = sections("report/rules.md")[TITLE]
_FORM = {
    "quality": float, "density": Share, "active": float, "units": Count,
    "parameters": {"model": Count, "mlps": Count}, "bytes": Count,
}  # fmt: skip
_PRUNE = {
    "units": Count, "cut": Count, "logit": float, "moved": float, "trained_off": float,
    "pruned_off": float,
}  # fmt: skip
_RUN = {
    "arm": Name, "seed": Count, "forms": {"trained": _FORM}, "prune": (_PRUNE, None),
    "refused": dict, "speed": {"ratios": [{"to": Name, "value": Above0}], "ran": dict},
}  # fmt: skip
_SHAPE = {
    "benchmark": Literal["slim"],
    "threads": Count,
    "budget": float,
    "runs": [_RUN],
}
HEADS = (
    "change", "density", "active units", "MLP parameters", "saved bytes", "logits moved",
    "off from float64", "× faster, dense layers", "× faster, accelerated", "seeds",
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    """One form of an arm's models, means over seeds; `change` is paired with the form as trained.

    ``mlps`` and ``bytes`` are numbers as trained, of other forms the shares that are left.
    ``layers`` is time as trained ÷ this form's by dense layers, ``accelerated`` accelerated.
    """

    form: str
    seeds: int
    quality: Estimate
    change: Estimate | None
    density: Estimate
    active: Estimate
    mlps: Estimate
    bytes: Estimate
    layers: Factor | None
    accelerated: Factor | None


@dataclass(frozen=True)
class Moved:
    """The run in which pruning moved a logit most, relative to its largest logit."""

    logit: float
    moved: float
    trained_off: float
    pruned_off: float


@dataclass(frozen=True)
class Slimmed:
    """An arm: its forms, how pruning moved logits, and which forms there are not, and why.

    ``ran`` says by which programs the blocks of accelerated forms ran.
    """

    arm: str
    forms: tuple[Form, ...]
    moved: Moved | None
    refused: tuple[str, ...]
    ran: tuple[str, ...]


@dataclass(frozen=True)
class Slim:
    """A task's arms; ``budget`` is the share of the validation loss that thresholds may cost."""

    budget: float
    threads: int
    arms: tuple[Slimmed, ...]


def read_slim(folder: str | Path) -> Slim | None:
    """What `actsparse bench slim` found, by arm; None without ``slim.json``.

    Raises `RecordError` for a file that holds something else.
    """
    path = Path(folder) / SLIM
    record = read_checked(path, _SHAPE)
    if record is None:
        return None
    for run in record["runs"]:
        for name, form in run["forms"].items():
            check(f"{path}: {run['arm']}.forms.{name}", form, _FORM)
    arms = dict.fromkeys(run["arm"] for run in record["runs"])
    found = (_arm(arm, [run for run in record["runs"] if run["arm"] == arm]) for arm in arms)
    return Slim(record["budget"], record["threads"], tuple(found))


def slim_table(of: Slim, quality_name: str) -> Table:
    """A row for each form of each arm."""
    heads = ("arm", "form", quality_name, *HEADS)
    told = [f"{arm.arm}: {said}" for arm in of.arms for said in (*arm.refused, *arm.ran)]
    return Table(
        "slim-table",
        TITLE,
        tuple(map(Column, heads)),
        tuple((arm.arm, *_cells(quality_name, arm, f)) for arm in of.arms for f in arm.forms),
        (markdown(f"{'; '.join(told)}."),) if told else (),
    )


def slim_text(of: Slim) -> str:
    """How far pruning moved any logit, and the budget."""
    said = (
        f"Budget of the thresholds: {amount(100 * of.budget)} % of the validation loss. Threads: "
        f"{of.threads}."
    )
    found = {arm.arm: arm.moved for arm in of.arms if arm.moved is not None}
    if not found:
        return said
    name = max(found, key=lambda arm: _share(found[arm]))
    most = found[name]
    return (
        f"Pruning moved no logit of the validation rows by more than {amount(_share(most))} of the "
        f"largest ({name}: {amount(most.moved)} of {amount(most.logit)}, where float32 is off from "
        f"float64 by {amount(most.trained_off)} as trained and {amount(most.pruned_off)} pruned). "
        f"{said}"
    )


def _cells(quality_name: str, arm: Slimmed, form: Form) -> tuple[str, ...]:
    moved = arm.moved if form.form == "pruned" else None
    unit = (1, "") if form.form == "trained" else (100, " %")
    return (
        WORDS[form.form],
        quality(quality_name, form.quality),
        change(quality_name, form.change, 2),
        amount(form.density),
        amount(form.active),
        amount(form.mlps, *unit),
        amount(form.bytes, *unit),
        NONE if moved is None else f"{amount(moved.moved)} of {amount(moved.logit)}",
        NONE if moved is None else f"{amount(moved.trained_off)} / {amount(moved.pruned_off)}",
        ratio(form.layers),
        ratio(form.accelerated),
        str(form.seeds),
    )


def _share(found: Moved) -> float:
    return found.moved / found.logit if found.logit else 0.0


# -- one arm -----------------------------------------------------------------------------------


def _arm(arm: str, runs: list[Entry]) -> Slimmed:
    pruned = [run["prune"] for run in runs if run["prune"] is not None]
    moved = [Moved(**{key: each[key] for key in Moved.__annotations__}) for each in pruned]
    refused = (f"not {WORDS.get(f, f)}: {why}" for run in runs for f, why in run["refused"].items())
    ran = (
        f"{WORDS.get(form, form)}, accelerated: {how}"
        for run in runs
        for form, how in run["speed"]["ran"].items()
    )
    return Slimmed(
        arm=arm,
        forms=tuple(
            _form(name, [run for run in runs if name in run["forms"]])
            for name in WORDS
            if any(name in run["forms"] for run in runs)
        ),
        moved=max(moved, key=_share, default=None),
        refused=tuple(dict.fromkeys(refused)),
        ran=tuple(dict.fromkeys(ran)),
    )


def _form(name: str, runs: list[Entry]) -> Form:
    trained = name == "trained"

    def mean(read: Callable[[Entry], float], against: Callable[[float, float], float]) -> Estimate:
        pairs = ((read(run["forms"][name]), read(run["forms"]["trained"])) for run in runs)
        found = t_interval(against(own, other) for own, other in pairs)
        assert found is not None
        return found

    def faster(program: str) -> Factor | None:
        return factor(_ratios(runs, program))

    def left(own: float, other: float) -> float:
        return own if trained else own / other

    return Form(
        form=name,
        seeds=len(runs),
        quality=mean(lambda form: form["quality"], _own),
        change=None if trained else mean(lambda form: form["quality"], lambda a, b: a - b),
        density=mean(lambda form: form["density"], _own),
        active=mean(lambda form: form["active"], _own),
        mlps=mean(lambda form: form["parameters"]["mlps"], left),
        bytes=mean(lambda form: form["bytes"], left),
        layers=faster(name),
        accelerated=faster(f"{name}, accelerated"),
    )


def _own(own: float, other: float) -> float:
    return own


def _ratios(runs: list[Entry], program: str) -> Iterable[Any]:
    return (r["value"] for run in runs for r in run["speed"]["ratios"] if r["to"] == program)
