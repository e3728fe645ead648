"""Where tokens stand, and whose padding it is: read off the call of the stack around a block."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse.blocks.tokens import tokens_of
from tests.blocks.stack import MASK, Cache, Stack, attached, ids


@pytest.fixture
def stack() -> Stack:
    return attached()


class StateCache:
    """Of a model whose layers have a state and no keys."""

    def __init__(self, full: bool) -> None:
        self.full = full

    def get_seq_length(self) -> int:
        raise ValueError("only linear attention here")

    def has_previous_state(self) -> bool:
        return self.full


def rows(positions: Tensor | int, batch: int, length: int) -> list[list[int]]:
    if isinstance(positions, int):
        return [list(range(positions, positions + length))] * batch
    return positions.expand(batch, length).tolist()


# --- positions ---------------------------------------------------------------------------------

GIVEN = torch.tensor([[7, 8, 9, 1], [3, 2, 1, 0]])


@pytest.mark.parametrize(
    ("call", "batch", "length", "want"),
    [
        ({}, 2, 4, [[0, 1, 2, 3]] * 2),
        ({"attention_mask": MASK}, 2, 4, [[0, 0, 0, 1], [0, 1, 2, 3]]),
        ({"attention_mask": MASK.bool()}, 2, 4, [[0, 0, 0, 1], [0, 1, 2, 3]]),
        ({"attention_mask": MASK.float()}, 2, 4, [[0, 0, 0, 1], [0, 1, 2, 3]]),
        ({"attention_mask": MASK, "position_ids": GIVEN}, 2, 4, GIVEN.tolist()),
        ({"position_ids": GIVEN[:1]}, 2, 4, [GIVEN[0].tolist()] * 2),
        ({"position_ids": GIVEN[0]}, 2, 4, [GIVEN[0].tolist()] * 2),
        ({"cache_position": torch.tensor([5, 6, 7, 8])}, 2, 4, [[5, 6, 7, 8]] * 2),
        # cache_position counts padding as well, so the mask goes before it
        (
            {"cache_position": torch.arange(4), "attention_mask": MASK},
            2, 4, [[0, 0, 0, 1], [0, 1, 2, 3]],
        ),
        # a mask of four axes (SDPA's) and positions of three (height, width, time) say nothing
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, 2, 4, [[0, 1, 2, 3]] * 2),
        ({"position_ids": torch.ones(3, 2, 4, dtype=torch.long)}, 2, 4, [[0, 1, 2, 3]] * 2),
        ({"position_ids": torch.ones(2, 9, dtype=torch.long)}, 2, 4, [[0, 1, 2, 3]] * 2),
        # with a past
        ({"past_key_values": Cache(6)}, 2, 1, [[6]] * 2),
        ({"past_key_values": Cache(6)}, 2, 3, [[6, 7, 8]] * 2),
        ({"past_key_values": Cache(3), "attention_mask": MASK}, 2, 1, [[1], [3]]),
        ({"past_key_values": Cache(2), "attention_mask": MASK}, 2, 2, [[0, 1], [2, 3]]),
        ({"past_key_values": ((torch.zeros(2, 1, 5, 8),) * 2,)}, 2, 1, [[5]] * 2),
        ({"past_key_values": ()}, 2, 2, [[0, 1]] * 2),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else str(value)[:40],
)  # fmt: skip
def test_where_tokens_stand(
    stack: Stack, call: dict[str, Any], batch: int, length: int, want: list[Any]
) -> None:
    tokens = stack(input_ids=ids(batch, length), **call)
    assert rows(tokens.positions(batch, length), batch, length) == want


def test_arguments_given_by_place_are_understood_as_well(stack: Stack) -> None:
    tokens = stack(ids(2, 4), MASK, GIVEN)
    assert tokens.positions(2, 4).tolist() == GIVEN.tolist()
    tokens = stack(ids(2, 4), MASK)
    assert tokens.positions(2, 4).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_one_call_leaves_nothing_to_the_next(stack: Stack) -> None:
    stack(ids(2, 4), MASK, GIVEN, cache_position=torch.arange(4, 8))
    tokens = stack(ids(2, 4))
    assert tokens.positions(2, 4) == 0
    assert tokens.keep(2, 4) is None


def test_a_mask_of_other_tokens_says_nothing_of_positions(stack: Stack) -> None:
    """Two towers under one call: the text's mask is longer than the image's tokens."""
    for more in ({}, {"input_ids": ids(1, 6)}):
        tokens = stack(**more, attention_mask=torch.tensor([[1, 1, 1, 0, 0, 0]]))
        assert tokens.positions(1, 5) == 0


def test_a_mask_of_one_row_is_for_every_sample(stack: Stack) -> None:
    tokens = stack(ids(2, 4), MASK[:1])
    assert rows(tokens.positions(2, 4), 2, 4) == [[0, 0, 0, 1]] * 2
    assert tokens.keep(2, 4).tolist() == [[False, False, True, True]] * 2


def test_a_second_part_of_the_calls_tokens_has_no_known_place(stack: Stack) -> None:
    tokens = stack(ids(2, 6))
    assert tokens.positions(2, 2, of="pooled") == 0
    assert tokens.positions(2, 2, of="another block") == 0
    with pytest.raises(ValueError, match="is called on 2 of the 6 tokens of Stack at a time"):
        tokens.positions(2, 2, of="pooled")
    for _ in range(2):  # a shared block sees all of them, several times
        assert tokens.positions(2, 6, of="pooled") == 0


# --- caches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["past_key_values", "cache", "layer_past", "what_they_say_next"])
@pytest.mark.parametrize("kind", ["object", "tensor", "tuples", "tuples after None"])
def test_a_cache_is_known_by_what_it_can_do_not_by_its_name(
    stack: Stack, name: str, kind: str
) -> None:
    layer = (torch.zeros(2, 1, 5, 8),) * 2
    cache = {
        "object": Cache(5), "tensor": Cache(torch.tensor([5])),
        "tuples": (layer, layer), "tuples after None": [None, layer],
    }[kind]  # fmt: skip
    tokens = stack(ids(2, 3), **{name: cache})
    assert rows(tokens.positions(2, 3), 2, 3) == [[5, 6, 7]] * 2


def test_a_cache_is_read_before_the_layers_add_to_it(stack: Stack) -> None:
    length = torch.tensor([5])
    tokens = stack(ids(1, 2), cache=Cache(length))
    length += 2
    assert rows(tokens.positions(1, 2), 1, 2) == [[5, 6]]


@pytest.mark.parametrize(
    "given",
    [
        {"kv_cache": object()},
        {"mems": [torch.zeros(3, 2, 8)]},
        {"past": torch.zeros(2, 2, 1, 5, 8)},
        {"whatever": type("FancyCache", (), {})()},
        {"cache": StateCache(True)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_cache_that_cannot_be_read_warns_where_positions_depend_on_it(
    stack: Stack, given: dict[str, Any]
) -> None:
    tokens = stack(ids(2, 1), **given)
    with pytest.warns(RuntimeWarning, match=rf"{next(iter(given))}=\w+, whose length cannot"):
        assert tokens.positions(2, 1) == 0
    assert stack(ids(2, 1), position_ids=ids(2, 1), **given).positions(2, 1).tolist() == [[0]] * 2


@pytest.mark.parametrize(
    "given",
    [
        {"use_cache": True}, {"past_key_values": ()}, {"past_values": torch.zeros(2, 4, 1)},
        {"cache_implementation": "static"}, {"cache": StateCache(False)},
        {"position_embeddings": (torch.zeros(2, 4, 8),) * 2},
    ],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_what_is_no_cache_or_holds_nothing_does_not_warn(
    stack: Stack, given: dict[str, Any]
) -> None:
    assert stack(ids(2, 4), **given).positions(2, 4) == 0


def test_models_with_a_cache_of_their_own_say_where_they_are(stack: Stack) -> None:
    assert stack(ids(2, 3), start_pos=4).positions(2, 3) == 4
    tokens = stack(ids(2, 3), input_pos=torch.arange(4, 7))
    assert tokens.positions(2, 3).tolist() == [[4, 5, 6]]


def test_caches_that_disagree_are_refused_by_name(stack: Stack) -> None:
    assert stack(ids(2, 1), cache=Cache(3), other=Cache(3)).positions(2, 1) == 3
    tokens = stack(ids(2, 1), encoder_cache=Cache(3), decoder_cache=Cache(4))
    with pytest.raises(ValueError, match="encoder_cache of 3 tokens, decoder_cache of 4 tokens"):
        tokens.positions(2, 1)


def test_a_mask_that_leaves_out_the_cached_tokens_is_refused(stack: Stack) -> None:
    tokens = stack(ids(2, 4), MASK, cache=Cache(6))
    with pytest.raises(ValueError, match="6 tokens in the cache come before the 4"):
        tokens.positions(2, 4)


@given(past=st.integers(0, 5), length=st.integers(1, 4), room=st.integers(0, 3), data=st.data())
def test_a_mask_wider_than_cache_and_tokens_is_read_where_they_stand(
    past: int, length: int, room: int, data: st.DataObject
) -> None:
    """As with a static cache, whose mask may have room for tokens to come."""
    stack = Stack()
    tokens_of((stack,)).attach()
    bits = st.lists(st.booleans(), min_size=past + length + room, max_size=past + length + room)
    mask = torch.tensor([data.draw(bits)])
    want = (mask.long().cumsum(1) - 1).clamp(min=0)[:, past : past + length]
    for cache in (Cache(past), Cache(torch.tensor(past))):
        if room and not past and isinstance(cache.length, int):
            continue  # an int of 0 is also no cache at all
        tokens = stack(ids(1, length), mask, cache=cache)
        assert tokens.positions(1, length).tolist() == want.tolist()
        assert tokens.keep(1, length).tolist() == mask[:, past : past + length].tolist()


# --- which stack -------------------------------------------------------------------------------


class Tower(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class ImageTower(Tower):
    def forward(self, pixel_values: Tensor) -> None: ...


class TextTower(Tower):
    def forward(self, input_ids: Tensor, inputs_embeds: Tensor | None = None) -> None: ...


class Plain(Tower):
    def forward(self, x: Tensor) -> None: ...


def test_the_nearest_module_that_takes_tokens_is_the_stack_else_the_model() -> None:
    leaf = nn.Linear(2, 2)
    near, far, image, plain = TextTower(leaf), TextTower(leaf), ImageTower(leaf), Plain(leaf)
    for path, want in (
        ((plain, far, plain, near, leaf), near),
        ((far, image, plain), image),
        ((plain, leaf), plain),
    ):
        tokens = tokens_of(path)
        assert tokens.stack is want
        assert tokens_of(path) is tokens  # one for all its blocks
        for module in path:
            module.__dict__.pop("_actsparse_tokens", None)


def test_the_last_to_detach_takes_the_hook_and_the_attribute(stack: Stack) -> None:
    first = tokens_of((stack,))
    tokens_of((stack,)).attach()
    assert len(stack._forward_pre_hooks) == len(stack._forward_hooks) == 1
    first.detach()
    assert len(stack._forward_pre_hooks) == len(stack._forward_hooks) == 1
    first.detach()
    assert len(stack._forward_pre_hooks) == len(stack._forward_hooks) == 0
    assert sorted(vars(stack)) == sorted(vars(Stack()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_listens_to_its_own_stack(stack: Stack, duplicate: Callable[..., Any]) -> None:
    twin = duplicate(stack)
    assert tokens_of((twin,)) is not tokens_of((stack,))
    assert tokens_of((twin,)).stack is twin
    assert twin(ids(3, 5)).keep(3, 5) is None
    assert stack(ids(2, 4), MASK).keep(2, 4) is not None
    assert twin(ids(2, 4), MASK).keep(2, 4) is not None
