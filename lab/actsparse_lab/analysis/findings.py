"""What the records of an experiment say of its claims: effects by seed, verdicts, in words.

`actsparse reproduce NAME` leaves ``reproduction.json`` beside its runs, which says what they are
of. The claims stand in `actsparse_lab.papers`, a folder for each experiment; the rule that makes a
verdict of effects is `actsparse_lab.analysis.verdicts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from actsparse_lab.analysis.effects import Arms, Effects
from actsparse_lab.analysis.numbers import Scale, mean_effect
from actsparse_lab.analysis.numbers import effect as show_effect
from actsparse_lab.analysis.plots import Picture
from actsparse_lab.analysis.verdicts import Claim, Verdict, verdict
from actsparse_lab.records import Entry, Run

OURS = "ours"  # the source of a control, or of a check of how to read the others


@dataclass(frozen=True)
class Question:
    """A claim, and how an effect is read for each seed. ``full``: only the full form can tell.

    ``effect`` says in words what one effect is. ``scale`` is how it is shown: ``"log"`` is the
    natural logarithm of a ratio, shown as a change in per cent or a factor; ``"share"`` in per
    cent, ``"points"``, a difference of shares, in points of them; ``"number"`` as it is.
    """

    claim: Claim
    effects: Callable[[Arms], Effects]
    effect: str
    scale: Scale = "number"
    full: bool = False


@dataclass(frozen=True)
class Asked:
    """How a claim is asked of records: the parts of a `Question` that are no prose of the paper."""

    direction: Literal["rises", "falls"]
    effects: Callable[[Arms], Effects]
    effect: str
    scale: Scale = "number"
    least: float = 0.0
    full: bool = False

    def question(self, text: str, source: str) -> Question:
        """The question with the claim's words."""
        claim = Claim(text, source, self.direction, self.least)
        return Question(claim, self.effects, self.effect, self.scale, self.full)


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
        return "no seeds" if found is None else mean_effect(found, self.question.scale)

    @property
    def bar(self) -> str:
        """What effects must lie beyond."""
        claim = self.question.claim
        word = "above" if claim.direction == "rises" else "below"
        return f"{word} {self.value(claim.bar)}"

    def value(self, effect: float) -> str:
        """An effect as the question shows it."""
        return show_effect(effect, self.question.scale)


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
        if question.full and not manifest["full"]:
            continue
        effects = dict(sorted(question.effects(arms).items()))
        show = partial(show_effect, scale=question.scale)
        judged = verdict(question.claim, list(effects.values()), show=show)
        if len(effects) < planned and judged.word != "undecided":
            why = f"{planned - len(effects)} of {planned} seeds have no such number"
            judged = replace(judged, word="undecided", why=why)
        found.append(Finding(question, effects, judged))
    return Findings(experiment, manifest, tuple(found))
