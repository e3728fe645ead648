"""The report as a reader meets it: in a real browser, on a phone and on a desk."""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from actsparse_lab.analysis.theory_plots import THEORY
from actsparse_lab.papers.experiments import EXPERIMENTS
from actsparse_lab.report import write_report
from actsparse_lab.report.benchmark_plots import BENCHMARK_PICTURES
from actsparse_lab.report.page import PICTURES
from actsparse_lab.report.reproduction import EFFECTS

WIDTHS = (390, 1200)
RECORDS = Path(__file__).parents[2] / "benchmarks" / "reproduce"
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
# What a reader would run into. An image is drawn if its last pixel is opaque on a canvas.
MEASURE = """
function drawn(image) {
  if (!image.complete || !image.naturalWidth) return false;
  const canvas = document.createElement("canvas");
  const width = canvas.width = image.naturalWidth;
  const height = canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(width - 1, height - 1, 1, 1).data[3] === 255;
}
function measure(frame, number) {
  const page = frame.contentDocument, root = page.documentElement;
  const images = [...page.images];
  const table = page.querySelector(".scroll");
  const text = JSON.stringify({
    number,
    inner: frame.contentWindow.innerWidth, page: root.scrollWidth, body: page.body.scrollWidth,
    images: images.map(drawn),
    widest: Math.max(...images.map(i => i.getBoundingClientRect().right)),
    box: table.clientWidth, table: table.scrollWidth,
    heading: page.querySelector("h1").innerText,
    fetched: frame.contentWindow.performance.getEntriesByType("resource")
      .filter(e => !e.name.startsWith("data:")).length,
  });
  const out = document.createElement("pre");
  out.textContent = text;
  document.body.append(out);
}
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        reason = "chromium is not installed (apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="module")
def synthetic() -> Any:
    # The synthetic runs live beside the report's own tests; by path, so tests need be no package.
    source = Path(__file__).parents[1] / "report" / "conftest.py"
    spec = importlib.util.spec_from_file_location("synthetic_runs", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(synthetic: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("journey")
    synthetic.write_comparison(out)
    synthetic.write_theory(out, seeds=1, gated=True)
    synthetic.write_benchmarks(out)
    return write_report(out)


@pytest.fixture(scope="module")
def benchmarks_page(synthetic: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(*synthetic.write_benchmarks(tmp_path_factory.mktemp("benchmarks")))


def run(browser: str, profile: Path, *words: str) -> str:
    command = [browser, *QUIET, f"--user-data-dir={profile}", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def measure(browser: str, folder: Path, *views: tuple[Path, int]) -> list[dict[str, Any]]:
    """Shows each page in a frame of the given width; a frame's own text shares its origin."""
    wrapper = folder / "wrapper.html"
    frames = [
        f'<iframe style="width:{width}px;height:2000px;border:0" onload="measure(this, {number})" '
        f'srcdoc="{html.escape(page.read_text(encoding="utf-8"))}"></iframe>'
        for number, (page, width) in enumerate(views)
    ]
    # The page forbids scripts in itself; this one is the wrapper's.
    wrapper.write_text(
        f'<!doctype html><meta charset="utf-8"><script>{MEASURE}</script>{"".join(frames)}',
        encoding="utf-8",
    )
    dom = run(
        browser,
        folder / "profile",
        "--window-size=1400,2200",
        "--dump-dom",
        wrapper.as_uri(),
    )
    found = re.findall(r"<pre>(\{.*?\})</pre>", dom, re.DOTALL)
    assert len(found) == len(views), "a page did not finish loading"
    return sorted(map(json.loads, map(html.unescape, found)), key=lambda each: each["number"])


@pytest.fixture(scope="module")
def seen(
    browser: str, page: Path, benchmarks_page: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[int, dict[str, Any]]]:
    """What a reader sees of either page at each width."""
    views = [(each, width) for each in (page, benchmarks_page) for width in WIDTHS]
    found = measure(browser, tmp_path_factory.mktemp("seen"), *views)
    return {
        "page": dict(zip(WIDTHS, found[:2], strict=True)),
        "benchmarks": dict(zip(WIDTHS, found[2:], strict=True)),
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_and_every_plot_is_drawn(seen: Any, width: int) -> None:
    of = seen["page"][width]
    assert of["inner"] == width
    assert of["page"] <= width
    assert of["body"] <= width
    assert of["widest"] <= width
    assert of["images"] == [True] * len(PICTURES + THEORY + BENCHMARK_PICTURES)
    assert of["fetched"] == 0
    assert of["heading"].startswith("paper: ")
    if width == 390:
        assert of["table"] > of["box"]  # the table scrolls inside its own box


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_of_benchmarks_alone_fits_too(seen: Any, width: int) -> None:
    of = seen["benchmarks"][width]
    assert max(of["page"], of["body"], of["widest"]) <= width
    assert of["images"] == [True] * len(BENCHMARK_PICTURES)
    assert of["fetched"] == 0
    assert of["heading"].startswith("Dense time ÷ sparse time: one MLP 0.50 to 16.00; a whole")
    if width == 390:
        assert of["table"] > of["box"]


@pytest.mark.usefixtures("undrawn")  # tests/papers draws each of them
@pytest.mark.parametrize(
    "names", [["ratio", "noise"], pytest.param([*EXPERIMENTS], marks=pytest.mark.slow)], ids=len
)
def test_the_page_of_each_experiment_shows_the_plots_of_its_claims(
    browser: str, tmp_path: Path, names: list[str]
) -> None:
    pages = [write_report(RECORDS / name, out=tmp_path / name) for name in names]
    every = measure(browser, tmp_path, *((page, 390) for page in pages))
    for name, page, of in zip(names, pages, every, strict=True):
        experiment, text = EXPERIMENTS[name], page.read_text(encoding="utf-8")
        for picture in (*experiment.pictures, EFFECTS):
            assert f'<figure class="card" id="{picture.name}">' in text
        assert text.count('<span class="verdict') == len(experiment.questions)
        assert max(of["page"], of["body"], of["widest"]) <= 390, name
        assert of["images"] == [True] * text.count("<figure")
        assert of["heading"].startswith(experiment.title)


def test_the_measurement_sees_an_overflow_and_a_broken_plot(
    browser: str, page: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.html"
    text = page.read_text(encoding="utf-8")
    text = text.replace('<div class="card scroll"', '<div class="card"', 1)
    text = re.sub(r'(<img src="data:image/png;base64,.{4000})[^"]+', r"\1", text, count=1)
    bad.write_text(text, encoding="utf-8")
    (seen,) = measure(browser, tmp_path, (bad, 390))
    assert seen["page"] > 390
    assert seen["images"].count(False) == 1


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True])
def test_screenshot(browser: str, page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    shot = tmp_path / "shot.png"
    run(
        browser,
        tmp_path / "profile",
        f"--window-size={width},3000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--screenshot={shot}",
        page.as_uri(),
    )
    import matplotlib.image

    picture = matplotlib.image.imread(shot)
    assert struct.unpack(">II", shot.read_bytes()[16:24]) == (width, 3000)
    corner = picture[-1, 0, :3].mean()  # the page's own ground
    assert corner < 0.2 if dark else corner > 0.8
    assert picture[:, :, :3].std() > 0.02  # something is drawn on it
