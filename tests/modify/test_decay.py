"""decay_groups: which parameters decay, whatever their names and the engine's rules."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actsparse import ZerothBias, decay_groups, sparsify
from tests.zoo import BY_ID

KINDS = ("norm", "bias", "zeroth_bias")


def names(model: nn.Module, groups: list[dict[str, Any]]) -> dict[float, set[str]]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return {g["weight_decay"]: {by_id[id(p)] for p in g["params"]} for g in groups}


def excluded(model: nn.Module, *exclude: str) -> set[str]:
    return names(model, decay_groups(model, 0.3, exclude=exclude)).get(0.0, set())


# Norm scales and biases, read off the names that the model's authors gave them.
NORMS = {
    "vit-classifier": ("layernorm_before.weight", "layernorm_after.weight", "layernorm.weight"),
    "t5-relu": ("layer_norm.weight",),
    "gpt2": ("ln_1.weight", "ln_2.weight", "ln_f.weight"),
    "gemma2": ("norm.weight", "layernorm.weight"),
    "llama": ("norm.weight",),
    "bert-masked-lm": ("LayerNorm.weight",),
}


@pytest.mark.parametrize("case", NORMS)
@pytest.mark.parametrize("exclude", [(), ("norm",), ("bias",), ("zeroth_bias",), KINDS])
def test_every_parameter_is_in_exactly_one_group_and_kinds_do_as_asked(
    case: str, exclude: tuple[str, ...]
) -> None:
    model, inputs = BY_ID[case].build()
    sparsify(model, ZerothBias(finetune=True), inputs=inputs)
    groups = decay_groups(model, 0.3, exclude=exclude)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    counts = Counter(id(p) for group in groups for p in group["params"])
    assert counts == dict.fromkeys(map(id, trained.values()), 1)

    kinds = {
        "norm": {name for name in trained if name.endswith(NORMS[case])},
        "bias": {name for name in trained if name.endswith(".bias")},
        "zeroth_bias": {name for name in trained if name.endswith("zeroth_bias")},
    }
    assert kinds["norm"]
    assert kinds["zeroth_bias"]
    expected = set().union(*(kinds[kind] for kind in exclude))
    assert names(model, groups) == {
        decay: group
        for decay, group in ((0.3, trained.keys() - expected), (0.0, expected))
        if group
    }


def test_relative_position_tables_are_weights_though_their_name_says_bias() -> None:
    model, _ = BY_ID["t5-relu"].build()
    assert any("relative_attention_bias" in name for name, _ in model.named_parameters())
    assert not any("relative_attention_bias" in name for name in excluded(model, "norm", "bias"))


class Scale(nn.Module):
    """A norm under names that give nothing away."""

    def __init__(self, width: int, offset: float) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.full((width,), 1.0 - offset))
        self.shift = nn.Parameter(torch.zeros(width))
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.std(-1, keepdim=True) + 1e-6) * (self.g + self.offset) + self.shift


class LayerScale(nn.Module):
    """One dimension, but no norm and no bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_custom_norm_is_known_by_what_it_does(offset: float) -> None:
    model = nn.Sequential(Scale(6, offset), nn.Linear(6, 6), LayerScale(6))
    assert excluded(model, "norm") == {"0.g"}
    assert excluded(model, "bias") == {"0.shift", "1.bias"}


def test_norms_over_channels_are_norms_too() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(8), nn.GroupNorm(8, 8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)
    )
    assert excluded(model, "norm") == {f"{i}.weight" for i in range(4)}
    assert excluded(model, "bias") == {f"{i}.bias" for i in range(4)}


def test_attention_of_torch_has_its_biases_found() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert excluded(model, "norm") == {"norm1.weight", "norm2.weight"}
    biases = ("self_attn.in_proj_bias", "self_attn.out_proj.bias", "linear1.bias", "linear2.bias")
    assert excluded(model, "bias") == {*biases, "norm1.bias", "norm2.bias"}


def test_tied_parameters_come_once() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5), nn.LayerNorm(4))
    model[2].weight = model[0].weight
    model[3].weight = model[1].weight
    groups = decay_groups(model, 0.1, exclude=("norm",))
    assert [len(group["params"]) for group in groups] == [4, 1]
    torch.optim.AdamW(groups)  # refuses a parameter that comes twice


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    sparsify(model, ZerothBias(), inputs=torch.randn(2, 3, 4))  # freezes the norm's bias
    model[3].weight.requires_grad_(False)
    listed = names(model, decay_groups(model, 0.1, exclude=KINDS))
    assert listed[0.1] == {"1.weight"}
    assert listed[0.0] == {"0.weight", "1.bias", "1.actsparse.zeroth_bias", "3.bias"}


def test_one_kind_may_be_given_as_a_word() -> None:
    model = nn.LayerNorm(4)
    (scale, bias) = decay_groups(model, 0.1, exclude="bias")
    assert scale["params"] == [model.weight]
    assert bias["params"] == [model.bias]


@pytest.mark.parametrize(
    ("decay", "exclude", "message"),
    [
        (0.1, ("norms",), "unknown kinds \\['norms'\\].*known: norm, bias, zeroth_bias"),
        (0.1, "n", "unknown kinds \\['n'\\]"),
        (-0.1, (), "weight_decay=-0.1"),
        (float("nan"), (), "weight_decay=nan"),
    ],
)
def test_mistakes_are_named(decay: float, exclude: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decay_groups(nn.LayerNorm(4), decay, exclude=exclude)


def test_the_groups_decay_as_they_say() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(decay_groups(model, 0.5, exclude=("norm", "bias")), lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 0.5 if name == "1.weight" else 1.0
        assert torch.equal(p, factor * before[name]), name
