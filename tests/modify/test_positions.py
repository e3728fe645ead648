"""Zeroth biases stand at the true positions, whatever way the tokens come (issue item 5)."""

# ruff: noqa: C408  (a table of keyword arguments reads as one)
from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actsparse import ZerothBias, find_mlp_blocks, handle_of, sparsify
from actsparse.blocks.token_map import TokenMap
from tests.modify.decoders import (
    CACHE,
    LONG,
    LONGEST,
    MODELS,
    NEW,
    SHORT,
    D,
    biased,
    built,
    generate,
    gpt2,
    left_padded,
    tables,
    unpadded,
)


def ways(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Both prompts decoded without a cache and without padding, and in each other way."""
    ids, cached, lone = left_padded(), dict(use_cache=True), dict(use_cache=False)

    def alone(**options: Any) -> tuple[Tensor, Tensor]:
        results = [generate(model, unpadded(p), **options) for p in (SHORT, LONG)]
        return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results])

    return {
        "reference": alone(**lone),
        "cache": alone(**cached),
        "left padding": generate(model, ids, **lone),
        "left padding and cache": generate(model, ids, **cached),
    }


def disagreement(results: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[int, float]]:
    """For each way: how many tokens differ from the reference's, and the logits' distance."""
    tokens, logits = results["reference"]
    return {
        way: (int((t != tokens).sum()), float((x - logits).abs().max()))
        for way, (t, x) in results.items()
        if way != "reference"
    }


def agree(results: dict[str, tuple[Tensor, Tensor]]) -> bool:
    return all(count == 0 and far <= 1e-5 for count, far in disagreement(results).values())


# --- generate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MODELS))
def test_cache_and_left_padding_change_no_token_and_no_logit(name: str) -> None:
    model = biased(name)
    results = ways(model)
    assert agree(results), disagreement(results)
    # the biases are large: without them at least 8 of the 12 tokens are others, in each row
    plain = {"reference": ways(biased(name, 0.0))["reference"]}
    differ = (plain["reference"][0] != results["reference"][0]).sum(1)
    assert int(differ.min()) >= 8, differ


WRONG: dict[str, Callable[[Any, int], Any]] = {  # of the right positions, and how many
    "one further wherever there is a cache": lambda p, t: p + 1 if t == 1 else p,
    "always from zero, as bias[:T]": lambda p, t: 0,
    "padding not seen": lambda p, t: (
        p if isinstance(p, int) else torch.arange(int(p.max()) - t + 1, int(p.max()) + 1)[None]
    ),
}


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "opt"])
@pytest.mark.parametrize("wrong", sorted(WRONG))
def test_that_check_fails_where_positions_are_wrong(
    name: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = biased(name)
    assert agree(ways(model))
    right = TokenMap.positions
    monkeypatch.setattr(
        TokenMap, "positions", lambda self, b, t, of: WRONG[wrong](right(self, b, t, of), t)
    )
    assert not agree(ways(model))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_a_table_shifted_by_one_gives_other_tokens(name: str) -> None:
    right = ways(biased(name))
    model = biased(name)
    with torch.no_grad():
        for table in tables(model):
            table.copy_(table.roll(1, 0))
    shifted = ways(model)
    mixed = {"reference": right["reference"], "shifted": shifted["reference"]}
    assert not agree(mixed)
    assert disagreement(mixed)["shifted"][0] >= 8
    # and served shifted in one way of decoding only, it fails the check above
    assert not agree({**right, "cache": shifted["cache"]})


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_beam_search_is_the_same_with_and_without_a_cache(name: str) -> None:
    model = biased(name)
    found = [
        model.generate(
            **left_padded(), num_beams=3, do_sample=False, max_new_tokens=NEW,
            min_new_tokens=NEW, use_cache=cache, return_dict_in_generate=True, output_scores=True,
        )
        for cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(
        found[0].sequences_scores, found[1].sequences_scores, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_static_cache_stands_at_the_same_positions(name: str) -> None:
    model = biased(name)
    want = generate(model, left_padded(), use_cache=True)
    got = generate(model, left_padded(), use_cache=True, cache_implementation="static")
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("helper", ["prompt look-up", "assistant"])
def test_speculative_decoding_which_crops_the_cache_changes_no_token(
    name: str, helper: str
) -> None:
    model = biased(name)
    prompt = unpadded(LONG * 2)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if helper == "assistant":
        options = {"assistant_model": biased(name, 1.0)}
    want, _ = generate(model, prompt, use_cache=False)
    got = model.generate(
        **prompt, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, **options
    )
    assert torch.equal(got[:, -NEW:], want)


# --- forward, by hand --------------------------------------------------------------------------


def seen_positions(model: nn.Module, **call: Any) -> list[list[int]]:
    """The positions [B, T] whose biases the first block added, read off the gradient's home."""
    table = tables(model)[0]
    block = handle_of(model).blocks[0]
    with torch.no_grad():
        for other in tables(model):
            other.zero_()
        table.copy_(torch.arange(1.0, len(table) + 1)[:, None].expand_as(table))
    added: list[Tensor] = []
    before: list[Tensor] = []
    hooks = [
        block.norm.module.register_forward_hook(lambda m, a, out: before.append(out)),
        # fires behind the site's own hook
        block.up.module.register_forward_pre_hook(lambda m, a: added.append(a[0])),
    ]
    try:
        with torch.no_grad():
            model(**call)
    finally:
        for hook in hooks:
            hook.remove()
    rows = (added[0].reshape(before[0].shape) - before[0])[..., 0] - 1
    shape = next(v for k, v in call.items() if k in ("input_ids", "inputs_embeds")).shape[:2]
    return rows.round().long().reshape(shape).tolist()


DECODERS = ["gpt2", "llama", "opt"]


@pytest.mark.parametrize("name", [*DECODERS, "bloom"])
def test_without_a_mask_positions_count_from_zero(name: str) -> None:
    ids = torch.tensor([LONG, LONG])
    assert seen_positions(biased(name), input_ids=ids) == [[0, 1, 2, 3, 4, 5]] * 2


@pytest.mark.parametrize("name", [*DECODERS, "bloom"])
def test_the_mask_alone_tells_padding_on_both_sides(name: str) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    got = seen_positions(biased(name), input_ids=torch.tensor([LONG, LONG]), attention_mask=mask)
    assert got[0][2:] == [0, 1, 2, 3]
    assert got[1][:4] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", DECODERS)
def test_position_ids_given_count_more_than_the_mask(name: str) -> None:
    ids = torch.tensor([LONG, LONG])
    given = torch.tensor([[4, 5, 6, 0, 1, 2], [9, 8, 7, 6, 5, 4]])
    mask = torch.ones_like(ids)
    got = seen_positions(biased(name), input_ids=ids, position_ids=given, attention_mask=mask)
    assert got == given.tolist()
    one_row = seen_positions(biased(name), input_ids=ids, position_ids=given[:1])
    assert one_row == [given[0].tolist()] * 2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_embeddings_in_place_of_ids_stand_at_the_same_positions(name: str) -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    got = seen_positions(biased(name), inputs_embeds=torch.randn(2, 4, D), attention_mask=mask)
    assert got[0][1:] == [0, 1, 2]
    assert got[1] == [0, 1, 2, 3]


def test_sequences_packed_into_one_row_stand_at_their_own_positions() -> None:
    model = biased("llama")
    packed = {
        "input_ids": torch.tensor([SHORT + LONG]),
        "position_ids": torch.tensor([[*range(len(SHORT)), *range(len(LONG))]]),
    }
    with torch.no_grad():
        alone = [model(torch.tensor([ids]), use_cache=False).logits for ids in (SHORT, LONG)]
        got = model(**packed, use_cache=False).logits
    torch.testing.assert_close(got, torch.cat(alone, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [*DECODERS, "bloom", "mistral"])
def test_a_continuation_in_chunks_gives_the_logits_of_one_pass(name: str, padded: bool) -> None:
    model = biased(name)
    ids = torch.cat([left_padded()["input_ids"]] * 2, 1)
    mask = left_padded()["attention_mask"] if padded else torch.ones(2, 6, dtype=torch.long)
    mask = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    asks = padded and "position_ids" in inspect.signature(model.forward).parameters

    def part(start: int, end: int) -> dict[str, Any]:
        call = dict(input_ids=ids[:, start:end])
        if padded:
            call["attention_mask"] = mask[:, :end]
        if asks:  # for the model's own position embedding: ours reads the mask as well
            call["position_ids"] = positions[:, start:end]
        return call

    with torch.no_grad():
        want = model(**part(0, 12)).logits
        cache, got = None, []
        for start, end in ((0, 5), (5, 9), (9, 10), (10, 12)):
            out = model(**part(start, end), **{CACHE: cache}, use_cache=True)
            cache = out[CACHE]
            got.append(out.logits)
    keep = mask.bool()
    torch.testing.assert_close(torch.cat(got, 1)[keep], want[keep], rtol=0, atol=1e-5)


def test_encoder_and_decoder_keep_their_own_positions() -> None:
    model = biased("t5")
    encoder, decoder = tables(model)[0], tables(model)[-1]
    call = dict(left_padded(), decoder_input_ids=torch.tensor([[0, 5, 7], [0, 0, 7]]))
    call["decoder_attention_mask"] = torch.tensor([[1, 1, 1], [0, 1, 1]])
    model(**call).logits.sum().backward()
    used = [
        (table.grad.abs().sum(1) > 0).nonzero().flatten().tolist() for table in (encoder, decoder)
    ]
    assert used == [[0, 1, 2, 3, 4, 5], [0, 1, 2]]


def test_image_and_text_towers_keep_their_own_positions() -> None:
    """The text's padding says nothing about the image's tokens, though one call brings both."""
    from tests.zoo import BY_ID

    model, inputs = BY_ID["clip"].build()
    model.eval()
    sparsify(model, ZerothBias(finetune=True), inputs=inputs)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for table in tables(model):
            table.copy_(torch.randn(table.shape, generator=generator))
    want = model(**inputs).image_embeds
    # as many text tokens as the image has (4 patches and a class token), and one more
    for length in (5, 6):
        mask = torch.ones(len(inputs["input_ids"]), length, dtype=torch.long)
        mask[0, :3] = 0
        text = dict(input_ids=inputs["input_ids"][:, :length], attention_mask=mask)
        got = model(**text, pixel_values=inputs["pixel_values"]).image_embeds
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_sound_frames_masked_before_they_are_shortened_do_not_shift_its_tokens() -> None:
    from tests.zoo import BY_ID

    model, inputs = BY_ID["whisper"].build()
    model.eval()
    sparsify(model, ZerothBias(finetune=True), inputs=inputs)
    with torch.no_grad():
        for table in tables(model):
            table.copy_(torch.randn(table.shape))
    want = model(**inputs).encoder_last_hidden_state
    mask = torch.ones(3, 20, dtype=torch.long)  # 20 frames, 10 tokens
    got = model(**inputs, attention_mask=mask).encoder_last_hidden_state
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_encoder_reads_positions_off_its_padding_mask(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 40, batch_first=batch_first, norm_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x = torch.randn(2, 4, 16)
    arranged = x if batch_first else x.transpose(0, 1)
    sparsify(model, ZerothBias(length=9), inputs=arranged)
    (table,) = tables(model)
    with torch.no_grad():
        table.copy_(torch.randn(table.shape))
        short = x[:1, 2:]
        want = model(short if batch_first else short.transpose(0, 1))
        for kind in (torch.bool, torch.float32):
            padding = torch.zeros(2, 4, dtype=torch.bool)
            padding[0, :2] = True
            if kind.is_floating_point:
                padding = torch.zeros(2, 4).masked_fill(padding, -torch.inf)
            got = model(arranged, src_key_padding_mask=padding)
            got = got if batch_first else got.transpose(0, 1)
            want_rows = want if batch_first else want.transpose(0, 1)
            torch.testing.assert_close(got[:1, 2:], want_rows, rtol=0, atol=1e-5)


# --- longer than the table ---------------------------------------------------------------------


def short_table(name: str, length: int) -> nn.Module:
    model = copy.deepcopy(built(name))
    handle = handle_of(model)
    handle.remove()
    sparsify(model, ZerothBias(length=length), blocks=handle.blocks)
    return model


FIRST = {
    "gpt2": "transformer.h.0.mlp", "llama": "model.layers.0.mlp",
    "opt": "model.decoder.layers.0", "t5": "encoder.block.0.layer.1.DenseReluDense",
}  # fmt: skip


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", sorted(FIRST))
def test_a_longer_prompt_names_the_block_and_the_lengths(name: str, mask: bool) -> None:
    call = unpadded(LONG) if mask else {"input_ids": torch.tensor([LONG])}
    if name == "t5":
        call["decoder_input_ids"] = torch.tensor([[0]])
    with pytest.raises(ValueError, match=r"position 5 .* table of 4 positions") as error:
        short_table(name, 4)(**call)
    assert repr(FIRST[name]) in str(error.value)
    assert "ZerothBias(length=6)" in str(error.value)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_a_generation_that_outgrows_the_table_says_so_at_that_step(name: str) -> None:
    model = short_table(name, 8)
    decoder = "decoder.block.0.layer.2.DenseReluDense" if name == "t5" else FIRST[name]
    with pytest.raises(ValueError, match=r"position 8 .* table of 8 positions") as error:
        generate(model, unpadded(LONG))
    assert repr(decoder) in str(error.value)
    # left padding takes no room: the last of SHORT's tokens stands at 2
    ids, _ = generate(short_table("gpt2", 3 + NEW - 1), unpadded(SHORT))
    assert ids.shape == (1, NEW)


def test_left_padding_takes_no_room_in_the_table() -> None:
    model = short_table("llama", 3)
    ids = torch.tensor([[0] * 9 + SHORT])
    mask = (ids != 0).long()
    model(input_ids=ids, attention_mask=mask)
    with pytest.raises(ValueError, match="position 3"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids).cumsum(1).gt(8).long())


def test_the_finder_and_the_table_take_a_models_own_maximum() -> None:
    model = gpt2()
    inputs = {"input_ids": torch.tensor([LONG])}
    handle = sparsify(model, ZerothBias(), blocks=find_mlp_blocks(model, inputs))
    assert {len(table) for table in tables(model)} == {LONGEST}
    assert f"{LONGEST} positions (config." in str(handle)
