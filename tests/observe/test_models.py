"""Density on people's models: padding, caches, flattened rows, fast paths, checkpoints, sharing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from actsparse.blocks import find_mlp_blocks
from actsparse.observe import observe
from tests.observe.brute import Recorder, same
from tests.zoo import BY_ID, CASES, call
from tests.zoo.hf_decoders import lm, opt
from tests.zoo.hf_encoders import albert, t5

GPT = {"vocab_size": 37, "n_embd": 16, "n_inner": 40, "n_layer": 2, "n_head": 2, "n_positions": 16}
IDS = torch.randint(1, 37, (3, 6))
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
RIGHT = LEFT.flip(1)


def watch(
    model: nn.Module, inputs: Any, keep: Any = None, phase: str = "inference", **options: Any
) -> dict[str, Any]:
    """Run once observed and once by brute force, in the mode of ``phase``; they must agree."""
    blocks = find_mlp_blocks(model, inputs)
    model.train(phase == "train")
    with Recorder(blocks) as brute, observe(model, blocks=blocks, **options) as seen:
        call(model, inputs)
    summary = seen.summary(phase)  # type: ignore[arg-type]
    assert same(summary, brute.summary(keep))
    assert summary is not None
    return summary


@pytest.mark.parametrize("case", [case for case in CASES if case.blocks], ids=str)
def test_zoo(case: Any) -> None:
    model, inputs = case.build()
    blocks = find_mlp_blocks(model, inputs)
    if any(block.activation.call is None for block in blocks):
        pytest.skip("an activation whose derivative is unknown: refused, see test_density")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        watch(model, inputs, phase="train")  # where dropout stands between a and down


# --- padding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["relu", "gated-gelu"])
def test_t5_padding(act: str) -> None:
    model, inputs = t5(act=act)()
    target_mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    inputs |= {"attention_mask": RIGHT, "decoder_attention_mask": target_mask}
    names = [block.name for block in find_mlp_blocks(model, inputs)]
    keep = {name: (RIGHT if name.startswith("encoder") else target_mask).bool() for name in names}
    summary = watch(model, inputs, keep)
    tokens = {row["block"]: row["tokens"] for row in summary["blocks"]}
    assert set(tokens.values()) == {int(RIGHT.sum()), int(target_mask.sum())}


@pytest.mark.parametrize("mask", [LEFT, RIGHT])
def test_gpt2_padding(mask: Tensor) -> None:
    model, _ = lm(hf.GPT2LMHeadModel, hf.GPT2Config, **GPT)()
    for phase in ("train", "inference"):
        watch(model, {"input_ids": IDS, "attention_mask": mask}, mask.bool(), phase)


def test_an_explicit_mask_overrides_the_models_own() -> None:
    model, _ = lm(hf.GPT2LMHeadModel, hf.GPT2Config, **GPT)()
    inputs = {"input_ids": IDS, "attention_mask": LEFT}
    watch(model, inputs, RIGHT.bool(), mask=RIGHT)
    watch(model, inputs, None, mask=lambda b, t: None)


def test_left_padded_generation_with_a_cache_counts_each_token_once() -> None:
    model, _ = lm(hf.GPT2LMHeadModel, hf.GPT2Config, **GPT)()
    model.eval()
    with observe(model, inputs={"input_ids": IDS}) as seen:
        model.generate(IDS, attention_mask=LEFT, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    summary = seen.summary("inference")
    assert summary is not None
    assert summary["blocks"][0]["tokens"] == int(LEFT.sum()) + 3 * len(IDS)  # the last is not fed


def test_opt_flattens_its_rows() -> None:
    model, _ = opt()()
    watch(model, {"input_ids": IDS, "attention_mask": LEFT}, LEFT.bool())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("phase", ["train", "inference"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoder(batch_first: bool, phase: str, activation: str) -> None:
    layer = nn.TransformerEncoderLayer(
        16, 2, 40, activation=activation, batch_first=batch_first, dropout=0.1
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
    x, padding = torch.randn(3, 6, 16), ~RIGHT.bool()
    x = x if batch_first else x.transpose(0, 1)
    inputs = {"src": x, "src_key_padding_mask": padding}
    keep = RIGHT.bool() if batch_first else RIGHT.bool().T
    with torch.no_grad():  # with .eval(): the fast path, which would pass hooks by
        watch(model, inputs, keep, phase)
    fast = model.eval()(**inputs)
    with torch.no_grad(), observe(model, inputs=inputs):
        kept = model(**inputs)
    kept, fast = (t if batch_first else t.transpose(0, 1) for t in (kept, fast))
    torch.testing.assert_close(kept[RIGHT.bool()], fast[RIGHT.bool()])


# --- passes ---------------------------------------------------------------------------------------


def test_albert_shares_one_block_between_its_layers() -> None:
    model, inputs = albert(hf.AlbertModel)()
    (row,) = watch(model, inputs | {"attention_mask": LEFT}, LEFT.bool().repeat(4, 1))["blocks"]
    assert row["units"] == 40
    assert row["tokens"] == 4 * int(LEFT.sum())


# transformers 5.23 has renamed it; 5.0 knows only this name
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "t5-relu", "llama"])
def test_gradient_checkpointing_counts_once(family: str, reentrant: bool) -> None:
    model, inputs = BY_ID[family].build()
    blocks = find_mlp_blocks(model, inputs)
    counted = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        torch.manual_seed(0)
        with observe(model, blocks=blocks) as seen:
            for _ in range(2):
                if reentrant:  # its backward needs an input that has a gradient
                    model.enable_input_require_grads()
                out = model(**inputs, use_cache=False)
                (out[0] if isinstance(out[0], Tensor) else out.logits).sum().backward()
        counted.append((seen.summary("train"), seen.units(blocks[0].name, "train")))
    assert counted[0][0] == counted[1][0]
    assert torch.equal(counted[0][1], counted[1][1])
