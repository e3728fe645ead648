"""What cannot be pruned is named, with the reason, and the model stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from actsparse import observe, sparsify
from actsparse.blocks import find_mlp_blocks
from actsparse.modify import TopK
from actsparse.modify.prune_units import prune_dead_units
from tests.modify.dead_units import X, mlps, pruned
from tests.observe.brute import D, H
from tests.zoo import BY_ID


def of_bytes(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)


def scaled(layer: nn.Linear) -> None:
    layer.weight_scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: of_bytes(m[1].down), r"1\.down has a weight of torch.int8 .*quantised"),
        (lambda m: scaled(m[1].up), r"1\.up holds weight_scale .*quantised"),
        (lambda m: nn.utils.parametrizations.weight_norm(m[1].up), r"1\.up has no plain weight"),
        (lambda m: setattr(m[1].down, "weight", m[0].down.weight),
         r"tied parameters: 0\.down\.weight and 1\.down\.weight"),
        (lambda m: setattr(m[1], "down", nn.Linear(H, D)), r"1: 1\.down was replaced since"),
        (lambda m: setattr(m[1].up, "out_features", 3), r"weight of shape \[10, 6\], but widths"),
    ],
    ids=["int8", "with-scales", "parametrised", "tied", "exchanged", "wrong-widths"],
)  # fmt: skip
def test_layers_that_cannot_be_cut_are_named_and_the_model_stays(
    spoil: Callable[[Any], Any], reason: str
) -> None:
    model = mlps("relu", "relu")
    with observe(model, inputs=X) as seen:
        model(X)
    spoil(model)
    parameters = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"blocks whose hidden units cannot be cut: .*" + reason):
        prune_dead_units(model, seen)
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert [block.d_hidden for block in seen.blocks.values()] == [H, H]


def test_a_layer_of_two_blocks_stays() -> None:
    model = mlps("relu", "relu")
    model[1].down = model[0].down
    with pytest.raises(ValueError, match=r"0.down is shared with block '1.up'; 1.*block '0'"):
        pruned(model)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("phi3", r"mlp.gate_up_proj computes more than"),
        ("lora-gpt2-mlp", r"has adapters \(peft\); merge them first"),
        ("like-timm-with-mlp-norm", "a norm over its hidden units"),
    ],
)
def test_models_that_cannot_be_pruned_say_why(name: str, reason: str) -> None:
    model, inputs = BY_ID[name].build()
    model.eval()
    for block in find_mlp_blocks(model, inputs):
        block.pre_activation.weight.data[:3] = 0
        if block.pre_activation.bias is not None:
            block.pre_activation.bias.data[:3] = 0
        if hasattr(block.up.module, "lora_B"):
            block.up.module.lora_B["default"].weight.data.zero_()
    with pytest.raises(ValueError, match=reason):
        pruned(model, inputs)


def test_top_k_depends_on_how_many_units_there_are() -> None:
    model = mlps("relu")
    sparsify(model, TopK(0.5), inputs=X)
    with pytest.raises(ValueError, match="depends on the others"):
        pruned(model)


def test_a_sharded_model_is_refused(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = mlps("relu")
    with observe(model, inputs=X) as seen:
        model(X)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match=r"sharded \(FSDP\); prune before sharding"):
            prune_dead_units(model, seen)
    finally:
        torch.distributed.destroy_process_group()


def test_what_was_seen_must_fit() -> None:
    model = mlps("relu", "relu")
    with observe(model, inputs=X) as seen:
        model.train()(X)
    with pytest.raises(ValueError, match="has seen no token in phase 'inference'"):
        prune_dead_units(model, seen)
    with observe(model.eval(), "magnitudes", inputs=X) as seen:
        model(X)
    with pytest.raises(ValueError, match="density is not observed"):
        prune_dead_units(model, seen)
    one, other = find_mlp_blocks(model, X)
    with observe(model, blocks=[one]) as seen:
        model(X)
    with pytest.raises(ValueError, match="block '1' was not observed; seen has 0"):
        prune_dead_units(model, seen, blocks=[one, other])
    with pytest.raises(ValueError, match="blocks is empty"):
        prune_dead_units(model, seen, blocks=[])
    with pytest.raises(ValueError, match="not part of this Sequential"):
        prune_dead_units(copy.deepcopy(model), seen)
    with pytest.raises(ValueError, match=r"inside DataParallel: give model\.module"):
        prune_dead_units(nn.DataParallel(model), seen)
    prune_dead_units(model, seen)
    with pytest.raises(ValueError, match="has 5 hidden units, but 10 were seen: it was pruned"):
        prune_dead_units(model, seen)
