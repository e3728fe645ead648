"""One size up: the fit finds a power law, the prediction comes first, the page says both."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actsparse.cli.main import app
from actsparse_lab.analysis.effects import INFERENCE
from actsparse_lab.campaigns import frontier as plans
from actsparse_lab.report.width import claims_table, fits_of, widths_in, write_prediction
from tests.report.frontier_records import Made, write_task

WHOLE = "vanilla-no-1d-decay"
LOSS = [2.0, 2.01, 2.02, 2.03, 2.04]
EXPONENTS = {WHOLE: -0.5, "best": -0.25}  # of D
TOKENS = -0.3
AT_FIRST = {WHOLE: 0.2, "best": 0.02}


def write_width(out: Path, d: int, *, seeds: int = 5, jitter: float = 1e-4) -> None:
    """A width whose densities follow the power law, but for ``jitter`` from seed to seed."""
    loss = LOSS[:seeds]
    arms = {"vanilla": Made([each + 0.01 for each in loss], 0.3, jitter=jitter)}
    arms["paper"] = Made(loss, 0.1, jitter=jitter)
    arms["no-mlp"] = Made([each + 0.5 for each in loss], None)
    halves = {WHOLE: "half-steps", "best": "best-half-steps"}
    for arm, half in halves.items():
        density = AT_FIRST[arm] * (d / 64) ** EXPONENTS[arm]
        arms[arm] = Made(loss, density, jitter=jitter * density)
        arms[half] = Made([each + 0.05 for each in loss], density * 0.5**TOKENS)
    settings = {"batch_size": 16, "data": {"length": 128}, "model": {"n_layer": 4}}
    write_task(out, arms, task=f"width-{d}", name="nats per token", seeds=seeds, settings=settings)


def test_the_fit_finds_a_power_law(tmp_path: Path) -> None:
    for d in (64, 128, 256):
        write_width(tmp_path, d)
    found = fits_of(widths_in(tmp_path), INFERENCE)
    assert found is not None
    for arm, exponent in EXPONENTS.items():
        fit = found.of(arm)
        assert fit.width.mean == pytest.approx(exponent, abs=1e-3)
        assert fit.tokens is not None
        assert fit.tokens.mean == pytest.approx(TOKENS, abs=1e-3)
        assert fit.predicted.mean == pytest.approx(AT_FIRST[arm] * 6**exponent, rel=1e-3)
    fewer = found.fewer("best", WHOLE).mean
    assert fewer == pytest.approx(1 - 0.1 * 6**0.25, rel=1e-3)
    vanilla = found.of("vanilla")
    assert vanilla.tokens is None  # it has no run of half the steps
    assert vanilla.width.mean == pytest.approx(0, abs=1e-6)


def test_draws_of_seeds_span_what_seeds_differ_by(tmp_path: Path) -> None:
    for d in (64, 128):
        write_width(tmp_path, d, jitter=0.1)
    found = fits_of(widths_in(tmp_path), INFERENCE)
    assert found is not None
    span = found.of("best").predicted
    assert span.low is not None
    assert span.high is not None
    assert span.low < span.mean < span.high
    # at least as wide as the two ends of D = 128 alone, and no wider than all seeds together
    assert 0.01 < math.log(span.high / span.low) < 10 * math.log(1.4)


def test_single_seeds_give_no_interval(tmp_path: Path) -> None:
    for d in (64, 128):
        write_width(tmp_path, d, seeds=1)
    found = fits_of(widths_in(tmp_path), INFERENCE)
    assert found is not None
    assert found.of("best").predicted.low is None
    verdicts = [row[5] for row in claims_table(widths_in(tmp_path)).rows]
    assert set(verdicts) == {"shown, not judged: 1 seed"}


def test_claims_are_judged_by_the_frontiers_rules(tmp_path: Path) -> None:
    for d in (64, 128):
        write_width(tmp_path, d)
    verdicts = [(row[0], row[5]) for row in claims_table(widths_in(tmp_path)).rows]
    assert verdicts == [(d, "holds") for d in ("64", "64", "128", "128")]


def test_the_prediction_is_written_before_a_run_of_its_width_and_never_after(
    tmp_path: Path,
) -> None:
    write_width(tmp_path, 64)
    assert write_prediction(tmp_path) is None  # one width makes no law
    write_width(tmp_path, 128)
    path = write_prediction(tmp_path)
    assert path is not None
    said = json.loads(path.read_text())
    assert said["densities"]["inference"]["best"]["mean"] == pytest.approx(
        0.02 * 6**-0.25, rel=1e-3
    )
    write_width(tmp_path, 384)
    before = path.read_bytes()
    assert write_prediction(tmp_path) is None
    assert path.read_bytes() == before


def test_the_page_is_made_of_the_records(tmp_path: Path) -> None:
    for d in (64, 128, 256):
        write_width(tmp_path, d)
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "prediction.json").is_file()
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    for title in ("Claims at each width", "Density over tokens", "A power law, and a prediction"):
        assert f"<h2>{title}</h2>" in page
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--markdown"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("# One size up")
    assert "is predicted to have 84.3 %" in done.stdout


def test_a_tiny_campaign_of_two_widths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.jsonl"
    lines = [
        {"text": f"{n} bottles of beer on the wall, {n} bottles of beer. " * 8} for n in range(99)
    ]
    text.write_text("\n".join(map(json.dumps, lines)))
    for d in (64, 128):
        tiny = plans._width(d)
        tiny.settings["model"] |= {"n_embd": d // 8, "n_inner": d // 2}
        tiny.settings["data"] |= {"length": 16, "rows": 8}
        monkeypatch.setitem(plans.TASKS, f"width-{d}", tiny)
    out = tmp_path / "out"
    words = ["frontier", "width-64", "width-128", "--seeds", "1", "--steps", "8"]
    words += [each for d in (64, 128) for each in ("--data", f"width-{d}={text}")]
    words += ["--arms", f"{WHOLE},best,half-steps", "--workers", "1", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    (first, second) = widths_in(out)
    assert (first.d, second.d) == (64, 128)
    tokens = [row[2] for row in _rows(out, "Density over tokens") if row[0] == "best"]
    assert tokens == ["256", "512", "1020", "2050"] * 2  # 16 rows of 16 bytes a step


def _rows(folder: Path, title: str) -> list[list[str]]:
    done = CliRunner().invoke(app, ["report", str(folder), "--markdown"])
    part = done.stdout.partition(f"## {title}")[2].partition("\n## ")[0]
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in part.splitlines()
        if "|" in line
    ]
