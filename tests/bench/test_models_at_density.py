"""Arranged models have the density that was asked for, block by block, and say what they have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actsparse.bench.models_at_density import CLOSE, arrange, arranged, check, thresholds

TINY: dict[str, dict[str, Any]] = {
    "vit-b": {
        "batch": 12, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "image_size": 8, "patch_size": 2, "num_labels": 5,
    },
    "gpt2": {
        "length": 200, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_inner": 64, "vocab_size": 100,
    },
    "t5-base": {
        "prompt": 30, "length": 12, "d_model": 32, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 2, "d_kv": 16, "d_ff": 64, "vocab_size": 400,
    },
    "llama-135m": {
        "prompt": 30, "length": 12, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
        "vocab_size": 400,
    },
}  # fmt: skip
TINY["llama-135m-generate"] = TINY["llama-135m"]


def tolerance(tokens: int, units: int) -> float:
    """Of a block's density: its mean u is right within 1 / 2H of a token.

    Where two of a unit's tokens are closer than CLOSE standard deviations it has one token more.
    That of tokens near a quantile happens with probability T · CLOSE / √(2π) at most, below 0.01
    here: two units of 64 are far more than come up.
    """
    assert tokens * CLOSE < 0.02
    return (0.5 + 2) / (tokens * units)


@pytest.mark.parametrize("density", [0.05, 0.3])
@pytest.mark.parametrize("name", TINY)
def test_each_block_has_the_wanted_density(name: str, density: float) -> None:
    subject = arranged(name, density, **TINY[name])
    found = subject.densities()
    units = 64
    for block, value in found["blocks"].items():
        tokens = subject.mlps[0][1] if not block.startswith("decoder") else 12
        tokens += 11 if name.startswith("llama") else 0
        assert abs(value - density) <= tolerance(tokens, units), block
    low, high = min(found["blocks"].values()), max(found["blocks"].values())
    assert low <= found["density"] <= high
    assert len(found["blocks"]) == {"gpt2": 3, "t5-base": 4}.get(name, 2)


def test_density_is_measured_not_remembered() -> None:
    subject = arranged("gpt2", 0.05, **TINY["gpt2"])
    first = subject.blocks(subject.model)[0]
    with torch.no_grad():
        assert first.up.bias is not None
        first.up.bias.fill_(100.0)
    assert subject.densities()["blocks"][first.name] == 1.0


def test_a_decoder_is_arranged_on_what_it_writes() -> None:
    """T5: no layer writes to the mean over channels, and decoding is greedy and of full length."""
    subject = arranged("t5-base", 0.05, **TINY["t5-base"])
    model: Any = subject.model
    means = []
    for stack in (model.encoder, model.decoder):
        for layer in stack.block:
            layer.register_forward_hook(lambda _, args, out: means.append(out[0].mean(-1)))
    logits, tokens = subject.run(model)
    assert logits.shape == (1, 12, 400)
    assert tokens.shape == (1, 13)
    assert logits.argmax(-1).equal(tokens[:, 1:])
    assert len(tokens.unique()) > 6  # it does not repeat itself
    # sums of 32 channels of order 1, over a few layers
    limit = 100 * torch.finfo(torch.float32).eps
    assert all(float((mean - 0.25).abs().max()) < limit for mean in means)
    assert len(means) == 2 + 2 * 12


def test_a_loop_and_generate_write_the_same() -> None:
    logits, tokens = zip(
        *(
            (subject := arranged(name, 0.1, **TINY[name])).run(subject.model)
            for name in ("llama-135m", "llama-135m-generate")
        ),
        strict=True,
    )
    assert logits[0].shape == (1, 12, 400)
    assert logits[0].argmax(-1).equal(tokens[0][:, 1:])
    assert tokens[0].equal(tokens[1])
    assert torch.allclose(*logits, atol=1e-4)


@given(st.integers(4, 300), st.integers(1, 80), st.floats(0.001, 0.9), st.integers(0, 2**32 - 1))
def test_thresholds_leave_each_unit_its_share_of_tokens(
    tokens: int, units: int, density: float, seed: int
) -> None:
    torch.manual_seed(seed)
    z = torch.arange(tokens * units, dtype=torch.float64).view(units, tokens)
    z = torch.stack([row[torch.randperm(tokens)] for row in z], dim=1)  # no two are close
    active = (z > thresholds(z, density)).sum(0)
    exact = min(density * tokens, tokens - 2)
    assert all(abs(int(each) - exact) <= 1 for each in active)
    if density * tokens < tokens - 2:
        assert abs(float(active.double().mean()) - exact) <= 0.5 / units + 1e-4  # u is float32


def test_two_tokens_closer_than_rounding_are_not_told_apart() -> None:
    z = torch.tensor([3.0, 2.0, 2.0 - 2**-18, 1.0, 0.0, -1.0])[:, None].double()
    for density in (0.3, 0.4):  # u of one unit is 1/2: two tokens, but the third is too close
        assert int((z > thresholds(z, density)).sum()) == 3


def test_arranging_needs_no_second_pass() -> None:
    subject = arranged("vit-b", 0.1, **TINY["vit-b"])
    before = subject.densities()
    arrange(subject.blocks(subject.model), 0.1, lambda: subject.run(subject.model))
    units, tokens = 64, 204
    for block, value in subject.densities()["blocks"].items():
        assert abs(value - before["blocks"][block]) <= 2 * tolerance(tokens, units)


@pytest.mark.parametrize(
    ("name", "density", "message"),
    [
        (
            "vit",
            0.1,
            "unknown model 'vit'; known: vit-b, gpt2, t5-base, llama-135m, llama-135m-generate",
        ),
        ("gpt2", 0.0, "density=0.0: expected a number between 0 and 1"),
        ("gpt2", 1.0, "density=1.0: expected a number between 0 and 1"),
    ],
)
def test_bad_input_is_named(name: str, density: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arranged(name, density)
    with pytest.raises(ValueError, match=message):
        check(name, [0.5, density])
