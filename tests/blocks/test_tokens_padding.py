"""Padding and layouts: a mask fits the block's tokens, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from actsparse import (
    ActivationPenalty,
    ZerothBias,
    find_mlp_blocks,
    observe,
    sparsify,
)
from actsparse.blocks.batch_axis import attention_beside
from actsparse.blocks.token_map import TokenMap
from actsparse.blocks.tokens import tokens_of
from tests.blocks.stack import MASK, Cache, Stack, attached, ids
from tests.zoo.ready import fill


@pytest.fixture
def stack() -> Stack:
    return attached()


# --- padding -----------------------------------------------------------------------------------


def test_keep_is_false_at_padding(stack: Stack) -> None:
    tokens = stack(ids(2, 4), MASK)
    assert tokens.keep(2, 4).tolist() == MASK.bool().tolist()
    tokens = stack(ids(2, 2), MASK, past_key_values=Cache(2))
    assert tokens.keep(2, 2).tolist() == MASK[:, 2:].bool().tolist()
    tokens = stack(ids(2, 4))
    assert tokens.keep(2, 4) is None


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_torchs_padding_masks_are_true_or_minus_infinity_at_padding(
    stack: Stack, kind: str
) -> None:
    padding = MASK == 0
    if kind == "float":
        padding = torch.zeros(2, 4).masked_fill(padding, -torch.inf)
    tokens = stack(inputs_embeds=torch.zeros(2, 4, 8), src_key_padding_mask=padding)
    assert tokens.keep(2, 4).tolist() == MASK.bool().tolist()
    assert tokens.positions(2, 4).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    one = torch.zeros(4, 8)  # unbatched
    tokens = stack(inputs_embeds=one, src_key_padding_mask=padding[0])
    assert tokens.keep(1, 4).tolist() == MASK[:1].bool().tolist()


def attention(mask: Tensor, kind: str) -> Tensor:
    """The causal mask [B, 1, T, T] that a model makes of [B, T]."""
    length = mask.shape[1]
    attends = (torch.ones(length, length).tril() * mask[:, None]).bool()[:, None]
    if kind == "three axes":
        return attends[:, 0]
    return (
        torch.zeros(attends.shape).masked_fill(~attends, -torch.inf) if kind == "float" else attends
    )


@pytest.mark.parametrize("kind", ["bool", "float", "three axes", "by kind of layer"])
def test_a_token_that_may_not_attend_to_itself_is_padding(stack: Stack, kind: str) -> None:
    mask: Any = attention(MASK, kind)
    if kind == "by kind of layer":
        mask = {"full_attention": mask}
    assert stack(ids(2, 4), mask).keep(2, 4).tolist() == MASK.bool().tolist()


def test_a_mask_of_attention_is_read_behind_the_cached_tokens(stack: Stack) -> None:
    mask = attention(torch.tensor([[0, 1, 0, 1, 0], [1, 1, 1, 1, 1]]), "bool")[:, :, 2:4]
    tokens = stack(ids(2, 2), mask, cache=Cache(2))
    assert tokens.keep(2, 2).tolist() == [[False, True], [True, True]]
    short = MASK.bool()[:, None, None]  # one row for all that attend
    assert stack(ids(2, 4), short).keep(2, 4).tolist() == MASK.bool().tolist()


@pytest.mark.parametrize("mask", [torch.ones(3, 3).tril(), torch.ones(1, 1, 3, 3).tril()])
def test_a_mask_of_attention_without_samples_tells_no_padding(stack: Stack, mask: Tensor) -> None:
    keep = stack(ids(2, 3), mask.bool()).keep(2, 3)
    assert keep is None or bool(keep.all())


RAGGED = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"attention_mask": RAGGED}, r"attention_mask of shape \(2, 6\)"),
        ({"attention_mask": attention(RAGGED, "bool")}, "attention_mask of shape"),
        ({"attention_mask": object()}, "attention_mask"),
        ({"src_key_padding_mask": RAGGED == 0}, "attention_mask"),
        ({"pixel_mask": torch.ones(2, 4, 4).tril()}, r"pixel_mask of shape \(2, 4, 4\)"),
        ({"padding_mask": RAGGED == 0}, "padding_mask"),
        ({"lengths": [3, 6]}, "lengths"),
        ({"seq_lens": (3, 6)}, "seq_lens"),
        ({"valid": RAGGED.numpy()}, "valid"),
        ({"src_key_padding_mask": (RAGGED == 0).tolist()}, "attention_mask"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("shape", [(2, 3), (2, 7), (4, 6)], ids=["part", "more", "windows"])
def test_a_mask_that_does_not_fit_is_refused_by_name(
    stack: Stack, given: dict[str, Any], name: str, shape: tuple[int, int]
) -> None:
    tokens = stack(ids(2, 6), **given)
    with pytest.raises(ValueError, match=f"{name}.* runs on"):
        tokens.keep(*shape)
    with pytest.raises(ValueError, match=f"{name}.* sees rows of shape"):
        tokens.unpadded(torch.zeros(5, 8))


@pytest.mark.parametrize("shape", [(2, 3), (2, 7), (4, 6)])
def test_a_mask_that_hides_nothing_is_never_refused(stack: Stack, shape: tuple[int, int]) -> None:
    for each in (
        {"attention_mask": torch.ones_like(RAGGED)}, {"pixel_mask": torch.ones(2, 4, 4)},
        {"padding_mask": torch.zeros(2, 6, dtype=torch.bool)}, {"lengths": [6, 6]},
        {"lengths": [3, 6, 2]}, {"mask_names": ["a", "b"], "masks": [None, None]},
    ):  # fmt: skip
        tokens = stack(ids(2, 6), **each)
        assert tokens.keep(*shape) is None
        assert tokens.unpadded(torch.zeros(5, 8)) is None


def test_what_is_called_mask_pads_tokens_unless_torchs_own_encoder_attends_by_it() -> None:
    class Custom(Stack):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> TokenMap:
            return tokens_of((self,)).now

    for stack, hidden in ((Custom(), True), (Stack(), False)):
        tokens_of((stack,)).attach()
        tokens = stack(ids(2, 6), mask=RAGGED)
        if hidden:
            with pytest.raises(ValueError, match=r"mask of shape \(2, 6\)"):
                tokens.keep(2, 6)
        else:
            assert tokens.keep(2, 6) is None


def test_a_mask_that_cannot_be_looked_at_for_free_is_refused(stack: Stack) -> None:
    tokens = stack(ids(2, 6), torch.ones(2, 6, device="meta"))
    with pytest.raises(ValueError, match="attention_mask"):
        tokens.keep(2, 3)


def test_padding_that_a_model_appends_inside_is_refused_without_any_mask() -> None:
    config = hf.LongformerConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=20, max_position_embeddings=32, attention_window=4,
    )  # fmt: skip
    model = hf.LongformerModel(config, add_pooling_layer=False).eval()
    given = torch.full((2, 8), 3)
    with observe(model, inputs={"input_ids": given}) as seen, torch.no_grad():
        model(given)
        with pytest.raises(ValueError, match=r"appends padding of its own.* get 8; call it on 8"):
            model(given[:, :6])
    assert seen.summary("inference")["blocks"][0]["tokens"] == 16


class Experts(nn.Module):
    """Each token goes to one of two MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids).flatten(0, 1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (input_ids.flatten() % 2 == number).nonzero().flatten()
            out = out.index_add(0, rows, expert(x[rows]) * 0.5)
        return x + out


def test_padding_among_rows_of_an_expert_is_asked_for() -> None:
    model, given = Experts(), torch.tensor([[1, 2, 3, 5], [2, 4, 7, 8]])

    def tokens(padding: Tensor | None, **options: Any) -> list[int]:
        with observe(model, inputs={"input_ids": given}, **options) as seen, torch.no_grad():
            model(given, attention_mask=padding)
        return [block["tokens"] for block in seen.summary("train")["blocks"]]

    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 4\).* rows of shape"):
        tokens(MASK)
    assert tokens(None) == tokens(torch.ones_like(MASK)) == [4, 4]
    assert tokens(MASK, mask=lambda b, t: None) == [4, 4]
    kept = torch.tensor([[True, True, False, False]])  # of the rows of both
    assert tokens(MASK, mask=kept) == [2, 2]


def test_a_penalty_of_experts_needs_no_batch_and_refuses_a_mask_that_hides() -> None:
    model, given = Experts(), torch.tensor([[1, 3, 5, 7], [1, 3, 5, 2]])
    handle = sparsify(model, ActivationPenalty("l1", 1.0), inputs={"input_ids": given})
    model.train()
    model(given)
    assert 0 < handle.penalty().item() < float("inf")
    model(given * 2 + 1)  # one expert gets no token
    assert 0 < handle.penalty().item() < float("inf")
    with pytest.raises(ValueError, match="attention_mask"):
        model(given, attention_mask=MASK)


# --- layouts -----------------------------------------------------------------------------------


def test_stages_are_arranged_as_batch_time_features_and_back(stack: Stack) -> None:
    x = torch.randn(2, 4, 8)
    tokens = stack(ids(2, 4))
    for each in (x, x.reshape(8, 8)):  # OPT flattens
        assert torch.equal(tokens.arrange(each), x)
        assert torch.equal(tokens.restore(tokens.arrange(each), each), each)
    image = torch.randn(2, 3, 5, 8)
    assert torch.equal(tokens.arrange(image), image.reshape(2, 15, 8))
    assert torch.equal(tokens.restore(tokens.arrange(image), image), image)


def test_one_sequence_without_a_batch_is_a_batch_of_one(stack: Stack) -> None:
    x = torch.randn(4, 8)
    for each in ({"inputs_embeds": x}, {"input_ids": ids(1, 4)[0]}, {"input_ids": ids(1, 4)}):
        tokens = stack(**each)
        assert torch.equal(tokens.arrange(x), x[None])
        assert torch.equal(tokens.restore(x[None], x), x)


def test_flattened_rows_that_fit_no_call_are_refused_with_both_shapes(stack: Stack) -> None:
    tokens = stack(ids(2, 4))
    with pytest.raises(ValueError, match=r"\(7, 8\).*Stack was called on shape \(2, 4\)"):
        tokens.arrange(torch.randn(7, 8))
    with pytest.raises(ValueError, match="cannot tell tokens apart"):
        tokens.arrange(torch.randn(8))
    with pytest.raises(ValueError, match="cannot tell tokens apart"):
        tokens.arrange(torch.randn(2, 8))  # as many rows as samples: an expert's, or pooled


def test_time_first_is_read_off_the_attention_beside_the_block() -> None:
    class Layer(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.attn, self.mlp = nn.MultiheadAttention(8, 2, batch_first=first), nn.Linear(8, 8)

    for first in (True, False):
        layer = Layer(first)
        assert attention_beside((nn.Sequential(layer), layer, layer.mlp)) is first
    assert attention_beside((nn.Linear(8, 8),)) is None
    tokens = TokenMap(batch_first=False)
    x = torch.randn(4, 2, 8)
    assert torch.equal(tokens.arrange(x), x.transpose(0, 1))
    assert torch.equal(tokens.restore(tokens.arrange(x), x), x)


@pytest.mark.parametrize("known", [True, None])
def test_time_first_shows_where_batch_and_length_differ(known: bool | None) -> None:
    tokens = TokenMap(shape=(2, 4), length=4, batch_first=known)
    x = torch.randn(2, 4, 8)
    assert torch.equal(tokens.arrange(x), x)
    assert torch.equal(tokens.arrange(x.transpose(0, 1)), x)
    assert torch.equal(tokens.restore(x, x.transpose(0, 1)), x.transpose(0, 1))
    of, count = tokens.samples(x.transpose(0, 1))
    assert of.tolist() == [[0, 1]] * 4
    assert count == 2


def test_where_they_are_equal_and_the_finder_could_not_tell_it_is_refused() -> None:
    tokens = TokenMap(shape=(4, 4), length=4, batch_first=None)
    with pytest.raises(ValueError, match="cannot tell batch from time"):
        tokens.arrange(torch.randn(4, 4, 8))


class OwnAttention(nn.Module):
    """As fairseq and Megatron do it: [T, B, D] inside, attention by hand."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        self.time_first = time_first
        self.embed, self.norm = nn.Embedding(40, 16), nn.LayerNorm(16)
        self.up, self.act, self.down = nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        x = x.transpose(0, 1) if self.time_first else x
        x = x + self.down(self.act(self.up(self.norm(x))))
        return x.transpose(0, 1) if self.time_first else x


@pytest.mark.parametrize("shape", [(2, 6), (1, 6), (6, 1), (6, 6), (1, 1)])
@pytest.mark.parametrize("time_first", [False, True])
def test_the_finder_tells_batch_from_time_for_every_shape(
    time_first: bool, shape: tuple[int, int]
) -> None:
    (block,) = find_mlp_blocks(OwnAttention(time_first), {"input_ids": ids(*shape)})
    assert block.batch_first is not time_first


@pytest.mark.parametrize("shape", [(2, 6), (6, 6)])
@pytest.mark.parametrize("found", [(2, 6), (6, 6), (1, 1)])
def test_padding_and_positions_are_the_same_whichever_axis_is_the_batch(
    shape: tuple[int, int], found: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    first = OwnAttention(False)
    second = OwnAttention(True)
    second.load_state_dict(first.state_dict())
    given = torch.randint(0, 40, shape)
    mask = torch.ones_like(given)
    mask[0, 2:] = 0
    results = []
    for model in (first, second):
        recipe = [ZerothBias(finetune=True, length=8), ActivationPenalty("l1", 1.0)]
        handle = sparsify(model, recipe, inputs={"input_ids": ids(*found)})
        fill(model)
        model.train()
        with observe(model) as seen:
            out = model(given, attention_mask=mask)
        results.append((out, handle.penalty(), seen.summary("train")["density"]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-6, atol=0)
