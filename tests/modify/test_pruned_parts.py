"""Pruning and thresholds beside a handle that knows a part of the blocks, or came later."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actsparse import accelerate, load, observe, save, sparsify
from actsparse.blocks import find_mlp_blocks
from actsparse.modify.prune_units import pruned_layers
from actsparse.modify.thresholds import calibrate_thresholds, thresholds_of
from tests.modify.dead_units import X, mlps, pruned
from tests.observe.brute import H


def test_a_pruned_block_outside_the_handle_is_not_saved(tmp_path: Path) -> None:
    model = mlps("relu", "relu")
    pruning = pruned(model)
    found = find_mlp_blocks(model, X)
    some = type(found)(list(found)[:1], found.refused, found.inputs)
    sparsify(model, "vanilla", blocks=some)
    with pytest.raises(ValueError, match=r"would lose the widths of 1\.up, which were pruned"):
        save(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    pruning.remove()
    assert pruned_layers(model) == {}
    save(model, tmp_path / "m")
    twin = load(tmp_path / "m", mlps("relu", "relu"))
    assert torch.equal(twin(X), model(X))


def test_what_came_after_pruning_follows_the_width_back() -> None:
    model = mlps("relu")
    pruning = pruned(model)
    handle = sparsify(model, "vanilla", inputs=X)
    fast = accelerate(model, inputs=X, mode="sparse")
    with torch.no_grad():
        model(X)
    pruning.remove()
    widths = [block.d_hidden for block in handle.blocks]
    assert [*widths, *(run.block.d_hidden for run in fast.runs.values())] == [H, H]


def test_thresholds_are_kept_without_a_recipe_and_sparsify_says_how_to_add_one(
    tmp_path: Path,
) -> None:
    model = mlps("relu")
    with observe(model, "magnitudes", inputs=X) as seen, torch.no_grad():
        model(X)
    calibrate_thresholds(model, seen, share=0.05)
    advice = r"thresholds_of\(model\)\.remove\(\),.* sparsify.* calibrate_thresholds again"
    assert torch.equal(load(save(model, tmp_path / "m"), mlps("relu"))(X), model(X))
    with pytest.raises(ValueError, match=advice):
        sparsify(model, "vanilla", inputs=X)
    found = thresholds_of(model)
    assert found is not None
    found.remove()
    sparsify(model, "vanilla", inputs=X)
    calibrate_thresholds(model, seen, share=0.05)
    save(model, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m", mlps("relu"))(X), model(X))
