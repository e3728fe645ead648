"""In notebooks handles, sessions, measures and blocks are tables; in a list they take one line."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actsparse import accelerate, find_mlp_blocks, measure, observe, sparsify

X = torch.randn(4, 5, 8)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))


def loss_fn(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch[0])[:, 0], batch[1]


def shown() -> dict[str, Any]:
    """Each object that people have in hand, of one model."""
    net = model()
    handle = sparsify(net, "paper", inputs=X)
    seen = observe(net)
    net.eval()(X)
    batch = (X, torch.zeros(4, dtype=torch.long))
    measures = measure(net, loss_fn, [batch], ["density", "hessian"])
    seen.close()
    plain = model()
    fast = accelerate(plain, inputs=X, mode="sparse")
    plain(X)
    blocks = find_mlp_blocks(model(), X)
    return {
        "handle": handle, "seen": seen, "measures": measures, "accelerated": fast,
        "blocks": blocks, "block": blocks[0],
    }  # fmt: skip


SHOWN = shown()


@pytest.mark.parametrize(
    ("name", "line", "cell"),
    [
        ("handle", "<Handle paper: 1 MLP block of Sequential, step 0>", "relu → jsrelu"),
        ("seen", "<Seen density: 1 MLP blocks, closed>", "inference"),
        ("measures", "<Measures density, hessian: 4 samples>", "hessian"),
        ("accelerated", "<Accelerated: 1 MLP blocks>", "sparse"),
        ("block", "<MLPBlock (root): 0 → 1 → 2 (relu) → 3, 8 → 32>", "relu"),
    ],
)
def test_repr_is_one_line_and_html_a_table(name: str, line: str, cell: str) -> None:
    assert repr(SHOWN[name]) == line
    html = SHOWN[name]._repr_html_()
    assert html.startswith("<table>")
    assert f"<td>{cell}</td>" in html
    assert html.count("<tr>") == html.count("</tr>") > 1


def test_blocks_are_a_table_that_says_what_was_refused() -> None:
    html = SHOWN["blocks"]._repr_html_()
    assert "<caption>1 MLP blocks</caption>" in html
    assert repr(SHOWN["blocks"]) == f"[{SHOWN['block']!r}]"


def test_text_of_the_model_is_escaped() -> None:
    net = nn.Sequential()
    net.add_module("<script>", model())
    handle = sparsify(net, "paper", inputs=X)
    for each in (handle, handle.blocks, handle.blocks[0]):
        assert "<script>" not in each._repr_html_()


def test_a_plot_shows_each_block_and_phase() -> None:
    axes = SHOWN["seen"].plot()
    (line,) = axes.get_lines()
    summary = SHOWN["seen"].summary("inference")
    assert line.get_label() == "inference"
    assert list(line.get_ydata()) == [row["density"] for row in summary["blocks"]]
    assert SHOWN["seen"].plot("dead", axes) is axes
    with pytest.raises(ValueError, match=r"has a number 'flatness'; known: dead, density"):
        SHOWN["seen"].plot("flatness")


def test_without_matplotlib_a_plot_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        SHOWN["seen"].plot()


def test_a_cell_that_runs_again_is_told_which_handle_to_remove() -> None:
    net = model()
    sparsify(net, inputs=X)
    with pytest.raises(ValueError, match=r"actsparse\.handle_of\(model\)\.remove\(\) first"):
        sparsify(net, inputs=X)
    fast = accelerate(net)
    with pytest.raises(ValueError, match=r"accelerated already.*remove\(\) of the handle"):
        accelerate(net)
    fast.remove()
    outer = nn.Sequential(net)
    with pytest.raises(ValueError, match=r"handle_of\(model\.get_submodule\(.0.\)\)\.remove"):
        sparsify(outer, inputs=X)
