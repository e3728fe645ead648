"""Offloaded weights, on 'meta' outside a layer's forward: what needs them is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

from actsparse import (
    SwapActivation,
    calibrate_thresholds,
    find_mlp_blocks,
    measure,
    observe,
    prune_dead_units,
    sparsify,
)
from tests.mlp import Mlp

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def plain(act: type[nn.Module] = nn.ReLU) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(Mlp(act(), 8, 32, norm=nn.LayerNorm(8)) for _ in range(2))).eval()


def offloaded(model: nn.Module, folder: Path | None = None) -> nn.Module:
    model = copy.deepcopy(model)
    if folder is None:
        accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    else:
        accelerate.disk_offload(model, folder, execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


@pytest.mark.parametrize("act", [nn.ReLU, nn.PReLU])
@pytest.mark.parametrize("disk", [False, True], ids=["cpu", "disk"])
def test_blocks_are_those_of_the_plain_model(
    act: type[nn.Module], disk: bool, tmp_path: Path
) -> None:
    model = plain(act)
    found = find_mlp_blocks(offloaded(model, tmp_path if disk else None), X)
    assert [b.row() for b in found] == [b.row() for b in find_mlp_blocks(model, X)]
    assert found.refused == []
    for block in found:
        assert (block.norm.scale, block.norm.bias) == ("weight", "bias")


@torch.no_grad()
def test_what_is_seen_and_thresholds_are_those_of_the_plain_model() -> None:
    def job(model: nn.Module) -> tuple[Any, Any, Tensor]:
        with observe(model, ["density", "magnitudes"], inputs=X) as seen:
            model(X)
        handle = calibrate_thresholds(model, seen, share=0.1)
        return seen.summary("inference"), handle.rows(), model(X)

    summary, rows, y = job(plain())
    summary_off, rows_off, y_off = job(offloaded(plain()))
    assert summary == summary_off
    assert rows == rows_off
    assert torch.equal(y, y_off)


def spectrum(model: nn.Module) -> None:
    with observe(model, "spectrum", inputs=X) as seen:
        model(X)
    seen.summary("inference")


def swap(model: nn.Module) -> None:
    sparsify(model, SwapActivation("jsrelu"), inputs=X)


def prune(model: nn.Module) -> None:
    with observe(model, inputs=X) as seen:
        model(X[:1, :1])
    prune_dead_units(model, seen)


def flatness(model: nn.Module) -> None:
    measure(model, lambda m, x: (m(x), x), [X], ["flatness"], inputs=X)


@pytest.mark.parametrize("job", [spectrum, swap, prune, flatness])
def test_what_needs_the_weights_names_the_cause(job: Callable[[nn.Module], None]) -> None:
    model = plain()
    off = offloaded(model)
    with pytest.raises(ValueError, match=r"its weights are on 'meta'.*offloaded"):
        job(off)
    assert torch.equal(off(X), model(X))


def test_a_layer_names_itself() -> None:
    (block, _) = find_mlp_blocks(offloaded(plain()), X)
    with pytest.raises(ValueError, match=r"layer '0\.up': its weights are on 'meta'"):
        block.up.weight  # noqa: B018
    with pytest.raises(ValueError, match=r"layer '0\.up': its weights are on 'meta'"):
        block.up.bias  # noqa: B018
    assert block.up.width == 32
