"""What else modifications and measures promise of a sharded model, checked in two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from actsparse import NormFloor, WeightNoise, load, save, sparsify
from actsparse.modify import decay_groups, handle_of
from actsparse.observe import observe
from tests.modify.many_worker import Variant, batch, build, layers, shard

VIT, T5 = Variant("vit"), Variant("t5")
X = batch(VIT, 0)


def names(groups: list[dict[str, list[Tensor]]], model: nn.Module) -> list[list[str]]:
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[of[id(parameter)] for parameter in group["params"]] for group in groups]


def check_decay_groups_tell_norms_of_sharded_models(folder: Path) -> None:
    model = build(VIT)
    before = names(decay_groups(model, 0.3, exclude=["norm"]), model)
    shard(model, layers(model))
    assert names(decay_groups(model, 0.3, exclude=["norm"]), model) == before


def check_a_zeroth_bias_after_sharding_is_refused(folder: Path) -> None:
    for parts in (layers, lambda model: []):
        model = build(VIT)
        shard(model, parts(model))
        with pytest.raises(ValueError, match="order is sparsify, fully_shard, optimizer"):
            sparsify(model, "paper", inputs=X)
        assert handle_of(model) is None


def check_a_floor_may_come_after_sharding(folder: Path) -> None:
    model = build(VIT)
    shard(model, layers(model))
    handle = sparsify(model, NormFloor(floor=1.5), inputs=X)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle.attach(optimizer)
    optimizer.step()
    scale = model.state_dict()["vit.layers.1.layernorm_after.weight"]
    assert bool((scale.full_tensor() == 1.5).all())


def check_an_optimizer_made_before_sharding_is_refused(folder: Path) -> None:
    model = build(VIT)
    handle = sparsify(model, "paper", inputs=X)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shard(model, layers(model))
    with pytest.raises(ValueError, match="make the optimizer after fully_shard"):
        handle.attach(optimizer)


def check_attach_after_an_evaluation_joins_nothing_twice(folder: Path) -> None:
    """The root's own parameters stay gathered behind a forward without a backward."""
    model = build(VIT)
    handle = sparsify(model, "paper", inputs=X)
    shard(model, [])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = names(optimizer.param_groups, model)
    with torch.no_grad():
        model(**X)
    handle.attach(optimizer)
    assert names(optimizer.param_groups, model) == before


def check_weight_noise_draws_from_the_whole_weight(folder: Path) -> None:
    """Also where layers are sharded one by one and hooks come after theirs."""
    for parts in (layers, lambda model: [m for m in model.modules() if isinstance(m, nn.Linear)]):
        model = build(VIT)
        sparsify(model, WeightNoise(layers=("up", "down", "attention")), inputs=X)
        torch.manual_seed(1)
        expected = model(**X).logits
        shard(model, parts(model))
        with observe(model):
            torch.manual_seed(1)
            found = model(**X).logits
        # a norm added up in two parts; float64
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def check_spectra_are_of_whole_weights(folder: Path) -> None:
    summaries = []
    for sharded in (False, True):
        model = build(VIT)
        if sharded:
            shard(model, layers(model))
        with observe(model, "spectrum", inputs=X) as seen:
            model.eval()(**X)
            summaries.append(seen.summary("inference"))
    assert summaries[0] == summaries[1] is not None


def check_remove_leaves_a_plain_sharded_model(folder: Path) -> None:
    plain = build(VIT)
    expected = plain(**X).logits
    model = build(VIT)
    handle = sparsify(model, "paper", inputs=X)
    shard(model, layers(model))
    model(**X).loss.backward()
    handle.remove()
    assert torch.equal(model(**X).logits, expected)
    assert model.state_dict().keys() == plain.state_dict().keys()


def check_save_writes_the_whole_model(folder: Path) -> None:
    for variant in (VIT, T5):
        path = folder / variant.model
        model = build(variant)
        sparsify(model, "paper", inputs=batch(variant, 0))
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        shard(model, layers(model))
        save(model, path)
        dist.barrier()
        # a class of transformers is built from its config; RMSNorm has taken T5LayerNorm's place
        again = load(path, None if variant is VIT else build(variant))
        for name, value in again.state_dict().items():
            assert torch.equal(value, expected[name]), name
        assert str(handle_of(again)) == str(handle_of(model)).replace("FSDP", "")
        dist.barrier()


def check_all(folder: Path) -> None:
    checks: list[Callable[[Path], None]] = [
        value
        for name, value in globals().items()
        if name.startswith("check_") and value is not check_all
    ]
    for check in checks:
        check(folder)
        print(check.__name__, flush=True)
