"""What the records of an experiment say of its claims: effects by seed, verdicts, in words.

`actsparse reproduce NAME` leaves ``reproduction.json`` beside its runs, which says what they are
of. The claims stand in `actsparse_lab.report.claims`, a file for each experiment; the rule that
makes a verdict of effects is `actsparse_lab.report.verdict`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from actsparse.untrusted import read_json
from actsparse.values import Count, Name, Text, check
from actsparse_lab.records import Entry, Run, write_whole
from actsparse_lab.report.comparison import Estimate
from actsparse_lab.report.plots import Picture
from actsparse_lab.report.verdict import Claim, Verdict, verdict
from actsparse_lab.report.words import amount

MANIFEST = "reproduction.json"
V1 = "v1"  # Peng et al. 2023, arXiv 2309.03004
V2 = "v2"  # Peng et al. 2026, arXiv 2605.25612
OURS = "ours"  # a control, or a check of how to read the others
_SHAPE = {
    "name": Name, "full": bool, "seeds": Count, "steps": (Count, None), "command": Text,
    "time": {"seconds": float},
}  # fmt: skip
Effects = dict[int, float]  # by seed
Scale = Literal["log", "share", "points", "number"]


class Arms(dict[str, dict[int, Run]]):
    """The finished runs, ``arms[arm][seed]``; an arm that has none is empty."""

    def __init__(self, runs: Sequence[Run]) -> None:
        super().__init__()
        for run in runs:
            if run.finished:
                self.setdefault(run.arm, {})[run.seed] = run

    def __missing__(self, arm: str) -> dict[int, Run]:
        return {}


@dataclass(frozen=True)
class Question:
    """A claim, and how an effect is read for each seed.

    ``effect`` says in words what one effect is. ``scale`` is how it is shown: ``"log"`` is the
    natural logarithm of a ratio, shown as a change in per cent or a factor; ``"share"`` in per
    cent, ``"points"``, a difference of shares, in points of them; ``"number"`` as it is.
    """

    claim: Claim
    effects: Callable[[Arms], Effects]
    effect: str
    scale: Scale = "number"


@dataclass(frozen=True)
class Experiment:
    """One of the papers' experiments, as its page shows it.

    ``about`` says in two or three sentences what was done; ``limits`` what it cannot tell.
    Pictures are called with (`Arms`, dark).
    """

    name: str
    title: str
    about: str
    questions: tuple[Question, ...]
    pictures: tuple[Picture, ...]
    limits: str = ""


@dataclass(frozen=True)
class Finding:
    """A question answered: ``effects`` by seed, and the verdict on them."""

    question: Question
    effects: Effects
    verdict: Verdict

    @property
    def figure(self) -> str:
        """The mean effect with its interval, e.g. ``−23 % (−30 % to −15 %), 5 seeds``."""
        found = self.verdict.estimate
        return "no seeds" if found is None else _figure(found, self.question.scale)

    @property
    def bar(self) -> str:
        """What effects must lie beyond."""
        claim = self.question.claim
        word = "above" if claim.direction == "rises" else "below"
        return f"{word} {self.value(claim.bar)}"

    def value(self, effect: float) -> str:
        """An effect as the question shows it."""
        return _value(effect, self.question.scale)


@dataclass(frozen=True)
class Findings:
    """An experiment's answers, and the manifest of the runs they come from."""

    experiment: Experiment
    manifest: Entry
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "name": self.experiment.name,
            **{key: value for key, value in self.manifest.items() if key != "name"},
            "claims": [
                {
                    "claim": each.question.claim.text,
                    "source": each.question.claim.source,
                    "effect": each.question.effect,
                    "scale": each.question.scale,
                    "bar": each.question.claim.bar,
                    "direction": each.question.claim.direction,
                    "effects": {str(seed): value for seed, value in each.effects.items()},
                    "mean": None if (found := each.verdict.estimate) is None else found.mean,
                    "low": None if found is None else found.low,
                    "high": None if found is None else found.high,
                    "verdict": each.verdict.word,
                    "why": each.verdict.why,
                }
                for each in self.findings
            ],
        }


def findings(experiment: Experiment, runs: Sequence[Run], manifest: Entry) -> Findings:
    """Read every question's effects off the finished runs and judge them.

    A question is undecided where any of the seeds that were meant to be run has no effect: those
    that are left, of runs that did not fail, would be a choice.
    """
    arms, planned = Arms(runs), int(manifest["seeds"])
    found = []
    for question in experiment.questions:
        effects = dict(sorted(question.effects(arms).items()))
        show = partial(_value, scale=question.scale)
        judged = verdict(question.claim, list(effects.values()), show=show)
        if len(effects) < planned and judged.word != "undecided":
            why = f"{planned - len(effects)} of {planned} seeds have no such number"
            judged = replace(judged, word="undecided", why=why)
        found.append(Finding(question, effects, judged))
    return Findings(experiment, manifest, tuple(found))


def write_manifest(folder: str | Path, **fields: Any) -> None:
    """Say what the runs in ``folder`` are of; written whole or not at all."""
    text = json.dumps(fields, indent=2) + "\n"
    write_whole(Path(folder) / MANIFEST, text.encode())


def read_manifest(folder: str | Path) -> Entry | None:
    """What `write_manifest` wrote; None where there is none. `RecordError` for another file."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    found = read_json(path)
    check(str(path), found, _SHAPE)
    return dict(found)


# -- effects ----------------------------------------------------------------------------------


Reader = Callable[[Run], float | None]


def paired(
    arms: Arms, arm: str, other: str, read: Reader, combine: Callable[[float, float], float | None]
) -> Effects:
    """``combine(own, other's)`` for each seed that both arms have a number of."""
    found: Effects = {}
    for seed, run in arms[arm].items():
        if seed not in arms[other]:
            continue
        own, others = read(run), read(arms[other][seed])
        effect = None if own is None or others is None else combine(own, others)
        if effect is not None:
            found[seed] = effect
    return found


def within(arms: Arms, arm: str, read: Reader) -> Effects:
    """One number of each run of an arm."""
    found = {seed: read(run) for seed, run in arms[arm].items()}
    return {seed: value for seed, value in found.items() if value is not None}


def log_ratio(own: float, other: float) -> float | None:
    """``ln(own / other)``; None unless both are above 0.

    >>> log_ratio(1.0, 1.0)
    0.0
    """
    return math.log(own / other) if own > 0 and other > 0 else None


def difference(own: float, other: float) -> float:
    """``own − other``."""
    return own - other


# -- in words ---------------------------------------------------------------------------------


def _value(value: float, scale: Scale, like: float | None = None) -> str:
    """``−23 %``, ``÷ 12`` and ``× 20`` of a logarithm; ``like`` is one that it is to look like.

    >>> [_value(math.log(ratio), "log") for ratio in (0.77, 1, 1.5, 20, 1 / 12)]
    ['−23 %', '0 %', '+50 %', '× 20', '÷ 12']
    >>> _value(-0.01, "points"), _value(0.724, "share")
    ('−1 point', '72.4 %')
    """
    if scale == "number":
        return amount(value)
    if scale == "share":
        return f"{amount(100 * value)} %"
    if scale == "points":
        text = amount(100 * value)
        return f"{'+' if value > 0 else ''}{text} point{'' if text in ('1', '−1') else 's'}"
    if abs(value if like is None else like) >= math.log(10):
        return f"{'×' if value > 0 else '÷'} {amount(math.exp(abs(value)))}"
    return f"{'+' if value > 0 else ''}{amount(100 * math.expm1(value))} %"


def _figure(found: Estimate, scale: Scale) -> str:
    seeds = f"{found.n} seed{'s' if found.n > 1 else ''}"
    mean, *ends = (
        _value(value, scale, like=found.mean)
        for value in (found.mean, found.low, found.high)
        if value is not None
    )
    if scale == "points":  # the unit once
        ends = [end.split(" ")[0] for end in ends]
    return f"{mean} ({' to '.join(ends)}), {seeds}" if ends else f"{mean}, {seeds}"
