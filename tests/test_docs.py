"""The pages of docs/: their examples run, their commands parse, and no number is left out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn

from actsparse.cli.main import app
from actsparse.observe import CURVATURES, MEASURES, measure
from actsparse_lab.cli.options import chosen, names
from tests.mlp import Mlp
from tests.observe.brute import Phi

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "measures.md"
TEXT = PAGE.read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.findall(r"^    (actsparse .*)$", TEXT, re.MULTILINE)
PLAIN = {"block", "value", "products"}  # words that say what they are
WORDS = set(re.findall(r"[a-z]\w*", " ".join(re.findall(r"`([^`\n]+)`", TEXT))))


@pytest.fixture
def page() -> Iterator[dict[str, Any]]:
    """The names that the examples leave behind, run in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        names: dict[str, Any] = {}
        for code in CODE:
            exec(compile(code, PAGE.name, "exec"), names)
        yield names
    finally:
        torch.set_default_dtype(torch.float32)


# Sums of at most H = 32 squares and 64 tokens, all positive, and a few products: off by less than
# 200 · 2ε, 1e-13. The gradients below are sums of 8 terms that may cancel, hence some digits less.
RELATIVE = 1e-10


def test_the_examples_run_one_after_the_other(page: dict[str, Any]) -> None:
    row, found = page["row"], page["found"]
    assert row["density_from_flatness"] == pytest.approx(row["derivative_density"], rel=RELATIVE)
    assert set(found.curvature) == {"gauss_newton", "token_copies", "hessian"}


def test_a_language_models_mean_is_read_as_sums_over_positions(page: dict[str, Any]) -> None:
    up, rest = page["model"][0], page["model"][1:]
    squares = []
    for x, y in zip(page["tokens"], page["targets"], strict=True):
        z = up(x)
        loss = nn.functional.cross_entropy(rest(z), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, z)
        squares.append(float((gradient.square().sum(1) * x.square().sum(1)).sum()))
    flatness = page["seen"].summary("train")["flatness"]
    assert flatness == pytest.approx(sum(squares) / 4, rel=RELATIVE)


def test_every_number_of_a_summary_is_on_the_page(page: dict[str, Any]) -> None:
    batches = [{"x": torch.randn(6, 4, 8), "y": torch.randint(8, (6, 4))}]
    model = Mlp(Phi("s_shape"), 8, 16, gated=True)  # a formula that every measure can read
    found = measure(
        model, lambda m, b: (m(b["x"]), b["y"]), batches, [*MEASURES, *CURVATURES],
        labels="model", inputs=batches[0]["x"], probes=2,
    )  # fmt: skip
    assert found.measures is not None
    (row,) = found.measures["blocks"]
    keys = {
        *page["row"],
        *found.measures,
        *row,
        *found.spectra[0]["marchenko_pastur"],
        *found.curvature,
    }
    keys |= {key for name in CURVATURES for key in found.curvature[name]}
    layer = r"^(gate|down)_(?=concentration|stable|trace|ks|outl|random)"
    keys = {re.sub(layer, "up_", key) for key in keys}
    keys = {
        "flatness_error" if key.endswith("_error") and "flatness" in key else key for key in keys
    }
    assert keys - WORDS - PLAIN == set()


def test_every_measure_has_its_name_on_the_page() -> None:
    assert {*MEASURES, *CURVATURES} - WORDS == set()


def test_the_examples_of_sparse_execution_run() -> None:
    text = (ROOT / "docs" / "sparse-execution.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(first, "sparse-execution.md", "exec"), names)
    assert names["model"][0].weight.grad is not None
    exec(compile(second, "sparse-execution.md", "exec"), names)
    assert names["text"].shape == (1, 7)


def parsed(command: str) -> tuple[str, dict[str, Any]]:
    """The verb of a command line, and its options as they are read."""
    group: Any = typer.main.get_command(app)
    _, verb, *arguments = shlex.split(command)
    with group.make_context("actsparse", [verb, *arguments]) as context:
        options = group.get_command(context, verb).make_context(verb, arguments).params
    return verb, options


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_parse_and_name_known_measures(command: str) -> None:
    verb, options = parsed(command)
    if verb == "measure":
        asked = names(options["measures"])
    else:
        asked = chosen(options["task"], False, None, None, None, None, options["given"])[0].get(
            "measures", ()
        )
    assert set(asked) <= {*MEASURES, *CURVATURES}


@pytest.mark.parametrize("page", sorted(PAGE.parent.glob("*.md")), ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
    for to in re.findall(r"\]\(([^)]+)\)", text):
        if to.startswith("#"):
            assert to[1:] in anchors
        elif "://" not in to:
            assert (PAGE.parent / to.partition("#")[0]).exists()
