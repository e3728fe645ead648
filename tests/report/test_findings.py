"""Effects are read per seed from finished runs, and verdicts come of them by the rule alone."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actsparse_lab.analysis.effects import (
    INFERENCE,
    QUALITY,
    Arms,
    difference,
    log_ratio,
    paired,
    within,
)
from actsparse_lab.analysis.findings import (
    Experiment,
    Finding,
    Findings,
    Question,
    findings,
)
from actsparse_lab.analysis.manifest import REPRODUCTION
from actsparse_lab.analysis.verdicts import Claim, Verdict
from actsparse_lab.papers.experiments import EXPERIMENTS
from actsparse_lab.records import RecordError, Run, read_runs
from actsparse_lab.report import findings_in, markdown_reproduction, write_report
from actsparse_lab.report.reproduction import counts, effects_plot

MANIFEST: dict[str, Any] = {
    "name": "ratio",
    "full": False,
    "seeds": 5,
    "steps": None,
    "command": "actsparse reproduce ratio",
    "time": {"seconds": 90.0},
}
SPARSER = Question(
    Claim("paper is sparser", "v1", "falls"),
    lambda arms: paired(arms, "paper", "vanilla", INFERENCE, log_ratio),
    "ln of the density over vanilla's",
    "log",
)
KEPT = Question(
    Claim("accuracy is kept", "v1", "rises", -0.01),
    lambda arms: paired(arms, "paper", "vanilla", QUALITY, difference),
    "accuracy minus vanilla's",
    "points",
)


@pytest.fixture
def pair(add_run_to: Callable[..., Run], measured: Callable[..., Any]) -> Callable[..., None]:
    """Writes a paper and a vanilla run of one seed."""

    def write(out: Path, seed: int, own: float, other: float, quality: float = 0.97) -> None:
        add_run_to(out, "paper", seed, inference=measured(own), quality=quality)
        add_run_to(out, "vanilla", seed, inference=measured(other), quality=0.97)

    return write


def found(out: Path, *questions: Question) -> Findings:
    experiment = Experiment("made", "Made", "made up", questions, ())
    return findings(experiment, read_runs(out), MANIFEST)


def test_effects_are_paired_by_seed_and_of_finished_runs_alone(
    tmp_path: Path,
    pair: Callable[..., None],
    add_run: Callable[..., Run],
    measured: Callable[..., Any],
) -> None:
    for seed in range(5):
        pair(tmp_path, seed, own=0.1 * 1.1**seed, other=0.2)
    add_run("paper", 7, inference=measured(0.1))  # no twin
    add_run("vanilla", 8, inference=measured(0.1))
    arms = Arms(read_runs(tmp_path))
    effects = SPARSER.effects(arms)
    # the records hold Python's own decimals, so that the logarithms are the same to the bit
    assert effects == {seed: math.log(0.1 * 1.1**seed / 0.2) for seed in range(5)}
    assert arms["no such arm"] == {}
    assert set(within(arms, "paper", INFERENCE)) == {0, 1, 2, 3, 4, 7}
    (one,) = found(tmp_path, SPARSER).findings
    assert one.verdict.word == "holds"
    mean = math.log(0.5) + 2 * math.log(1.1)  # of seeds 0 to 4
    assert one.figure.startswith(f"{100 * math.expm1(mean):.3g} % (".replace("-", "−"))


def test_a_reversal_turns_the_verdict_and_four_seeds_decide_nothing(
    tmp_path: Path, pair: Callable[..., None]
) -> None:
    for seed in range(5):
        pair(tmp_path / "dense", seed, own=0.3 * 1.01**seed, other=0.2)
    for seed in range(4):
        pair(tmp_path / "few", seed, own=0.1 * 1.01**seed, other=0.2)
    assert found(tmp_path / "dense", SPARSER).findings[0].verdict.word == "does not hold here"
    few = found(tmp_path / "few", SPARSER).findings[0]
    assert (few.verdict.word, few.verdict.why) == (
        "undecided",
        "4 paired seeds; 5 are the fewest that can decide",
    )


def test_seeds_that_are_left_of_more_decide_nothing(
    tmp_path: Path, pair: Callable[..., None]
) -> None:
    for seed in range(5):
        pair(tmp_path, seed, own=0.1 * 1.01**seed, other=0.2)
    experiment = Experiment("made", "Made", "made up", (SPARSER,), ())
    for planned, word in ((5, "holds"), (6, "undecided")):
        (one,) = findings(experiment, read_runs(tmp_path), MANIFEST | {"seeds": planned}).findings
        assert one.verdict.word == word
    assert one.verdict.why == "1 of 6 seeds have no such number"


def test_no_effect_is_hardly_ever_said_to_hold(tmp_path: Path, pair: Callable[..., None]) -> None:
    """Of 400 experiments without effect; the rule promises fewer than 1 of 20 false *holds*."""
    draw = random.Random(0)
    for seed in range(5):
        pair(tmp_path, seed, 0.2, 0.2)
    runs = {(run.arm, run.seed): run for run in read_runs(tmp_path)}
    false = 0
    for _ in range(400):
        for run in runs.values():
            assert run.result is not None
            run.result["inference"]["density"] = 0.2 * math.exp(draw.gauss(0, 0.1))
        made = findings(Experiment("made", "", "", (SPARSER,), ()), list(runs.values()), MANIFEST)
        false += made.findings[0].verdict.word == "holds"
    assert false < 400 / 20


def test_numbers_are_shown_on_their_scale() -> None:
    def shown(mean: float, scale: Any) -> str:
        claim = Claim("", "", "rises", mean)
        return Finding(
            Question(claim, lambda arms: {}, "", scale), {}, Verdict("holds", None, "")
        ).bar

    assert shown(math.log(0.5), "log") == "above −50 %"
    assert shown(math.log(20), "log") == "above × 20"
    assert shown(-0.01, "points") == "above −1 point"
    assert shown(0.724, "share") == "above 72.4 %"
    assert shown(0.5, "number") == "above 0.5"


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not whole JSON"), ("{}", "lacks 'name'"), ("[]", "must be an object of name")],
    ids=["torn", "empty", "list"],
)
def test_a_foreign_manifest_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "reproduction.json").write_text(text)
    with pytest.raises(RecordError, match=said):
        REPRODUCTION.read(tmp_path)


def test_an_unknown_experiment_is_refused_by_name(tmp_path: Path) -> None:
    REPRODUCTION.write(tmp_path, **(MANIFEST | {"name": "magic"}))
    with pytest.raises(RecordError, match="unknown experiment 'magic'; known: ratio, ablation"):
        findings_in(tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_the_page_the_json_and_the_document_say_the_same(
    tmp_path: Path, pair: Callable[..., None]
) -> None:
    for name in ("ratio", "ablation"):
        for seed in range(5):
            pair(tmp_path / name, seed, 0.1 * 1.01**seed, 0.2)
        REPRODUCTION.write(tmp_path / name, **(MANIFEST | {"name": name}))
    (tmp_path / "no-records").mkdir()
    page = write_report(tmp_path / "ablation").read_text(encoding="utf-8")
    kept = json.loads((tmp_path / "ablation" / "verdicts.json").read_text())
    document = markdown_reproduction(tmp_path, link="../")
    said = findings_in(tmp_path / "ablation")
    assert said is not None
    assert len(kept["claims"]) == len(EXPERIMENTS["ablation"].questions) == len(said.findings)
    for claim, each in zip(kept["claims"], said.findings, strict=True):
        assert claim["verdict"] == each.verdict.word
        assert f"| {each.verdict.word} |" in document or f"**{each.verdict.word}**" in document
    assert page.count('class="verdict') == len(kept["claims"])
    assert document.index("## ratio") < document.index("## ablation")
    assert "no-records" not in document
    assert 'id="effects"' in page
    assert (tmp_path / "ablation" / "plots" / "effects.png").read_bytes().startswith(b"\x89PNG")


def test_counts_read_as_a_sentence(tmp_path: Path, pair: Callable[..., None]) -> None:
    for seed in range(5):
        pair(tmp_path, seed, 0.1 * 1.01**seed, 0.2, quality=0.9 + 0.001 * seed)
    assert counts(found(tmp_path, SPARSER, KEPT)) == "1 of 2 claims hold here, 1 does not"
    none = found(tmp_path / "nothing", SPARSER, KEPT)
    assert counts(none) == "0 of 2 claims hold here, 2 undecided"
    assert effects_plot(none) is None
