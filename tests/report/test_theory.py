"""The plots and the section of why it is sparse: what is drawn is what the records hold."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from actsparse.observe.spectrum import MarchenkoPastur
from actsparse_lab.analysis import plots
from actsparse_lab.analysis import theory_plots as theory
from actsparse_lab.analysis.comparison import compare
from actsparse_lab.analysis.theory_plots import THEORY, marchenko_pastur
from actsparse_lab.records import Run, read_run, read_runs
from actsparse_lab.report import write_report
from tests.report.drawn import figures, words

AddRun = Callable[..., Run]
MeasuredBy = Callable[..., dict[str, Any] | None]
Draw = Callable[..., Figure | None]
REFERENCE = next(picture.plot for picture in THEORY if picture.name == "spectra-reference")


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> Iterator[Draw]:
    """Calls a plot and returns its figure, laid out but not rendered."""
    drawn = figures(monkeypatch, "png", plots, theory)

    def call(plot: plots.Plot, runs: list[Run], dark: bool = False) -> Figure | None:
        drawn.clear()
        plot(compare(runs), runs, dark)
        return drawn[0] if drawn else None

    return call


def panel(figure: Figure | None, begins: str) -> Axes:
    assert figure is not None
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(begins))


def mean_line(axes: Axes, arm: str) -> np.ndarray:
    """Of an arm, [points, 2]."""
    return np.asarray(next(line for line in axes.lines if line.get_label() == arm).get_xydata())


# -- over steps -------------------------------------------------------------------------------


def test_what_moves_draws_the_means_and_tells_numerator_from_denominator(
    theory_runs: Path, draw: Draw
) -> None:
    figure = draw(theory.what_moves, read_runs(theory_runs))
    assert figure is not None
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title.partition(":")[0] for title in titles] == [
        "density, measured",
        "numerator",
        "denominator",
        "part of c",
        "part of c",
    ]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", *["log"] * 4]
    steps = 250 * np.arange(1, 7)
    flatness = mean_line(panel(figure, "numerator"), "paper")
    assert flatness[:, 0].tolist() == steps.tolist()
    # Seeds 0 and 1 have 1 and 2 times 10^(1 − i).
    assert flatness[:, 1] == pytest.approx(1.5 * 10.0 ** -np.arange(6))
    density = mean_line(panel(figure, "density"), "paper")
    assert density[:, 1] == pytest.approx(0.4 / np.arange(1, 7))
    limits = {axes.get_xlim() for axes in figure.axes}
    assert len(limits) == 1  # one axis of steps


def test_separable_ratio_is_compared_with_density(theory_runs: Path, draw: Draw) -> None:
    figure = draw(theory.separable_ratio, read_runs(theory_runs))
    ratio = mean_line(panel(figure, "ratio: AF"), "vanilla")
    assert ratio[:, 1] == pytest.approx(1.25 * 0.5 / np.arange(1, 7))
    agreement = mean_line(panel(figure, "ratio / density"), "vanilla")
    assert agreement[:, 1] == pytest.approx(np.full(6, 1.25))


def test_a_path_goes_from_its_hollow_start_to_its_filled_end(theory_runs: Path, draw: Draw) -> None:
    figure = draw(theory.flatness_and_density, read_runs(theory_runs))
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    path = mean_line(axes, "paper")
    assert path[0] == pytest.approx([1.5, 0.4])
    assert path[-1] == pytest.approx([1.5e-5, 0.4 / 6])
    marks = [line for line in axes.lines if line.get_marker() not in ("", "None")]
    ends = {tuple(line.get_xydata()[0]): line.get_markerfacecolor() for line in marks}
    assert ends[tuple(path[0])] == axes.get_facecolor()
    assert ends[tuple(path[-1])] not in (axes.get_facecolor(), "none")


def test_null_missing_and_zero_leave_gaps_not_errors(
    tmp_path: Path, theory_parts: SimpleNamespace, draw: Draw
) -> None:
    theory_parts.write(tmp_path)
    runs = read_runs(tmp_path)
    paper = [run for run in runs if run.arm == "paper"]
    paper[0].train[1]["measures"]["noise_scale"] = None
    paper[0].train[2]["measures"]["flatness"] = 0.0  # has no place on a log axis
    paper[0].train[3]["measures"]["flatness"] = "low"
    for run in runs:
        for entry in run.train:
            if entry["measures"]:
                del entry["measures"]["input_norm"]
    moves = draw(theory.what_moves, runs)
    flatness = mean_line(panel(moves, "numerator"), "paper")
    assert np.isnan(flatness[:, 1]).tolist() == [False, False, True, True, False, False]
    assert moves is not None
    assert len(moves.axes) == 4  # none for what no record holds
    scale = mean_line(panel(draw(theory.noise, runs), "noise scale"), "paper")
    assert np.isnan(scale[:, 1]).tolist() == [False, True, False, False, False, False]


def test_a_torn_run_is_a_thin_line_and_no_mean(
    tmp_path: Path, theory_parts: SimpleNamespace, draw: Draw
) -> None:
    theory_parts.write(tmp_path)
    path = next(run.path for run in read_runs(tmp_path) if (run.arm, run.seed) == ("paper", 1))
    path.write_bytes(path.read_bytes()[:-5])
    assert read_run(path).torn
    axes = panel(draw(theory.what_moves, read_runs(tmp_path)), "numerator")
    assert mean_line(axes, "paper")[0, 1] == 1.0  # of seed 0 alone
    color = next(line.get_color() for line in axes.lines if line.get_label() == "paper")
    thin = [line for line in axes.lines if line.get_color() == color and line.get_alpha()]
    assert [line.get_ydata()[0] for line in thin] == [1.0, 2.0]


def test_curvature_over_steps_where_runs_stopped_to_measure(theory_runs: Path, draw: Draw) -> None:
    figure = draw(theory.curvature, read_runs(theory_runs))
    assert figure is not None
    (axes,) = figure.axes  # a negative trace has no place on a log axis
    assert mean_line(axes, "paper").tolist() == [[250, 1.5], [1500, 6.5]]


def test_spectral_concentration_is_the_mean_over_blocks(theory_runs: Path, draw: Draw) -> None:
    figure = draw(theory.concentration, read_runs(theory_runs))
    assert figure is not None
    assert len(figure.axes) == 4
    values = mean_line(panel(figure, "spectral concentration of down"), "paper")[:, 1]
    assert values.tolist() == [2.5] * 6  # 2 and 3


# -- spectra ----------------------------------------------------------------------------------


@given(
    p=st.integers(1, 2000),
    more=st.integers(0, 3000),
    variance=st.floats(1e-6, 1e6),
)
def test_the_curve_is_the_law_of_observe(p: int, more: int, variance: float) -> None:
    law = MarchenkoPastur(variance, (p, p + more), 0.0, 0, 0)
    x, f = marchenko_pastur(law.lower, law.upper)
    # They differ in p σ², here from the roots of the edges: a dozen roundings, of 2⁻⁵³ each, that
    # weigh as much more as the sum of the roots, σ (2 √N), is larger than their difference, σ 2 √p.
    weight = ((p + more) / p) ** 0.5
    assert f == pytest.approx(law.density(x), rel=12 * (1 + weight) * 2.0**-53)


def test_the_curve_holds_all_eigenvalues_and_has_their_mean() -> None:
    lower, upper = 1.0, 9.0  # σ² (√N ∓ √p)², so σ² N = ((√9 + √1) / 2)²
    x, f = marchenko_pastur(lower, upper)
    step = (upper - lower) / 401
    # The midpoint-like sum is off near the two edges alone, where f is a root: by less than step.
    assert f.sum() * step == pytest.approx(1, abs=step)
    assert (f * x).sum() * step == pytest.approx(4, abs=9 * step)


def test_spectra_show_first_middle_and_last_block_of_one_seed(
    theory_runs: Path, draw: Draw
) -> None:
    figure = draw(REFERENCE, read_runs(theory_runs))
    assert figure is not None
    assert figure.get_suptitle() == "vanilla, seed 0, of 5 blocks"
    titles = [axes.get_title(loc="left").split("\n") for axes in figure.axes]
    assert [title[0] for title in titles] == [
        f"{layer}, block {block}" for block in (1, 3, 5) for layer in ("up", "down")
    ]
    assert {tuple(title[1:]) for title in titles} == {("no fit, KS 0.20", "↑2")}


def test_bars_hold_every_eigenvalue_and_outliers_are_marked(
    add_run: AddRun, theory_parts: SimpleNamespace, draw: Draw
) -> None:
    spectra = [
        theory_parts.spectrum("a", "up", far=2.0),
        theory_parts.spectrum("a", "gate", far=50.0),
        theory_parts.spectrum("a", "down", outliers=0),
    ]
    figure = draw(REFERENCE, [add_run("vanilla", 0, spectra=spectra)])
    assert figure is not None
    scales = [axes.get_xscale() for axes in figure.axes]
    assert scales == ["linear", "log", "linear"]
    for axes, entry in zip(figure.axes, spectra, strict=True):
        heights, edges, _ = axes.patches[0].get_data()
        widths = np.diff(np.log(edges) if axes.get_xscale() == "log" else edges)
        assert (heights * widths).sum() == pytest.approx(1, rel=64 * 2.0**-53)  # of ≤ 64 bars
        marks = [line for line in axes.lines if line.get_marker() == "v"]
        assert sum(len(line.get_xdata()) for line in marks) == entry["marchenko_pastur"]["outliers"]
    assert figure.axes[2].get_title(loc="left").endswith("fits, KS 0.20")


@pytest.mark.parametrize(("times", "bars"), [(1, 24), (1000, 48)])
def test_bars_are_wide_where_eigenvalues_are_few(
    add_run: AddRun, theory_parts: SimpleNamespace, draw: Draw, times: int, bars: int
) -> None:
    entry = theory_parts.spectrum("a", outliers=0)  # 2 in each of 48 bins
    entry["counts"] = [times * count for count in entry["counts"]]
    figure = draw(REFERENCE, [add_run("vanilla", 0, spectra=[entry])])
    assert figure is not None
    heights, _, _ = figure.axes[0].patches[0].get_data()
    assert len(heights) == bars


def test_gated_blocks_have_three_layers_and_a_layer_that_is_missing_an_empty_place(
    tmp_path: Path, theory_parts: SimpleNamespace, draw: Draw
) -> None:
    theory_parts.write(tmp_path, seeds=1, gated=True)
    runs = read_runs(tmp_path)
    for run in runs:
        if run.result and "spectra" in run.result:
            del run.result["spectra"][1]  # the first block's gate
    figure = draw(REFERENCE, runs)
    assert figure is not None
    assert len(figure.axes) == 9
    assert [axes.axison for axes in figure.axes] == [True, False, *[True] * 7]


@pytest.mark.parametrize("outliers", [0, 2])
def test_narrow_spectra_can_be_laid_out(
    add_run: AddRun, theory_parts: SimpleNamespace, outliers: int
) -> None:
    """Rendered for once: a layout that fails is a warning, and so an error here."""
    layers = ("up", "gate", "down")
    spectra = [theory_parts.spectrum("a", layer, outliers, far=1e4) for layer in layers]
    run = add_run("vanilla", 0, spectra=spectra)
    png = REFERENCE(compare([run]), [run], True)
    assert png is not None
    assert png.startswith(b"\x89PNG")


# -- the page ---------------------------------------------------------------------------------


@pytest.mark.parametrize("picture", THEORY, ids=lambda picture: picture.name)
def test_records_without_the_numbers_have_no_such_plot(
    comparison: Path, add_run: AddRun, picture: plots.Picture, draw: Draw
) -> None:
    assert draw(picture.plot, read_runs(comparison)) is None
    assert draw(picture.plot, [add_run("no-mlp", 0, inference=None, training=None)]) is None


@pytest.mark.parametrize("picture", THEORY, ids=lambda picture: picture.name)
def test_one_seed_is_enough(
    tmp_path: Path, theory_parts: SimpleNamespace, picture: plots.Picture, draw: Draw
) -> None:
    theory_parts.write(tmp_path, seeds=1, gated=True)
    assert draw(picture.plot, read_runs(tmp_path), dark=True) is not None


@pytest.fixture(scope="module")
def page(theory_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("page") / "copy"
    shutil.copytree(theory_runs, copy)
    return write_report(copy)


def test_the_section_says_what_the_records_say(page: Path) -> None:
    text = words(page)
    assert "Why it is sparse" in text
    assert "That is arithmetic: it says which of the two moved, not why." in text
    assert "Over 96 pairs, in all lines and blocks of all runs, they differ by at most" in text
    assert "paper 20.5 ± 6.35 SE 2.12 −1.5" in text  # 12.7062 · (1/√2) / √2, and 3 / √2
    assert "samples: 64, labels: model, reduction: sum" in re.sub("split: [a-z]+, ", "", text)
    for picture in THEORY:
        assert picture.title in text
        assert picture.caption in text
    files = {path.name for path in (page.parent / "plots").iterdir()}
    assert {f"{picture.name}.png" for picture in THEORY} <= files
    assert json.loads((page.parent / "theory.json").read_text())["identity"]["count"] == 96


def test_every_image_has_the_size_it_says(page: Path) -> None:
    html = page.read_text("utf-8")
    sizes = dict(re.findall(r'alt="Plot: ([^"]+)" (width="\d+" height="\d+")', html))
    assert sizes["Quality against density"] == 'width="972" height="738"'
    tall = re.fullmatch(r'width="972" height="(\d+)"', sizes["What moves"])
    assert tall
    assert int(tall[1]) > 1000
