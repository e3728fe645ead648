"""What was seen can be kept: a session that goes on from its state counts as one undisturbed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse.observe import Seen, observe

D, H, T = 4, 6, 3
COUNTED = ["density", "flatness", "gradient", "noise"]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.gate(x)) * self.up(x))


class Both(nn.Module):
    """A plain and a gated block, the same each time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))
        self.gated = Gated()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.plain(x)
        return x + self.gated(x)


X = torch.randn(2, T, D, generator=torch.Generator().manual_seed(0))


def run(model: nn.Module, passes: list[tuple[bool, bool, int]]) -> None:
    """Passes: (training mode, backward, which data)."""
    for training, backward, seed in passes:
        x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(seed))
        out = model.train(training)(x).square().mean()
        if backward:
            out.backward()


def states(one: Seen, two: Seen) -> list[tuple[Tensor, Tensor]]:
    a, b = one.state_dict(), two.state_dict()
    assert list(a) == list(b)
    return [(a[key], b[key]) for key in a]


PASSES = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), max_size=5)


@settings(max_examples=20, deadline=None)
@given(passes=PASSES, cut=st.integers(0, 5), before=PASSES)
def test_split_anywhere_the_summary_is_that_of_one_undisturbed(
    passes: list[tuple[bool, bool, int]], cut: int, before: list[tuple[bool, bool, int]]
) -> None:
    """Bit for bit, since sums go on in the same order; and whatever the second had seen before."""
    model = Both()
    with observe(model, COUNTED, inputs=X) as whole:
        run(model, passes)
    with observe(model, COUNTED, inputs=X) as first:
        run(model, passes[:cut])
    with tempfile.TemporaryDirectory() as folder:
        torch.save(first.state_dict(), Path(folder, "state"))
        state = torch.load(Path(folder, "state"), weights_only=True)
    with observe(model, COUNTED, inputs=X) as second:
        run(model, before)
        second.load_state_dict(state)
        for phase in ("train", "inference"):
            assert second.summary(phase) == first.summary(phase)
        run(model, passes[cut:])
    for phase in ("train", "inference"):
        assert second.summary(phase) == whole.summary(phase)
    assert all(torch.equal(a, b) for a, b in states(second, whole))


def test_the_state_is_a_copy() -> None:
    model = Both()
    with observe(model, COUNTED, inputs=X) as seen:
        run(model, [(True, True, 0)])
        state = seen.state_dict()
        kept = {key: tensor.clone() for key, tensor in state.items()}
        run(model, [(True, True, 1), (False, False, 2)])
        assert all(torch.equal(state[key], kept[key]) for key in state)
        seen.load_state_dict(state)
        run(model, [(True, True, 1), (False, False, 2)])
        assert all(torch.equal(state[key], kept[key]) for key in state)


def test_a_state_can_be_loaded_under_inference_mode() -> None:
    model = Both()
    with observe(model, COUNTED, inputs=X) as seen:
        run(model, [(True, True, 0)])
        once = seen.summary("train")
        with torch.inference_mode():
            state = {key: tensor.clone() for key, tensor in seen.state_dict().items()}
            seen.load_state_dict(state)
        seen.reset()
        with torch.inference_mode():
            seen.load_state_dict(state)
        assert seen.summary("train") == once
        run(model, [(True, True, 0)])
        assert seen.summary("train") != once


def test_keys_name_block_phase_measure_and_number() -> None:
    model = Both()
    with observe(model, "density", inputs=X) as seen:
        assert [key for key in seen.state_dict() if "gated" in key] == [
            f"gated/{phase}/density/{i}" for phase in ("train", "inference") for i in range(3)
        ]
    with observe(model, "spectrum", inputs=X) as seen:  # of the weights as they are
        assert seen.state_dict() == {}


def test_what_nothing_was_counted_of_takes_no_room() -> None:
    model = Both()
    with observe(model, COUNTED, inputs=X) as seen:
        run(model, [(True, True, 0)])
        state = seen.state_dict()
        assert all(not tensor.numel() for key, tensor in state.items() if "/inference/" in key)
        assert all(tensor.is_contiguous() for tensor in state.values())  # for safetensors


def test_a_state_of_something_else_is_refused_and_changes_nothing() -> None:
    model = Both()
    wide = nn.Sequential(nn.Linear(D, H + 1), nn.ReLU(), nn.Linear(H + 1, D))
    narrow = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))
    with observe(model, ("density", "gradient"), inputs=X) as seen:
        run(model, [(True, True, 0)])
        with observe(model, "density", inputs=X) as other:
            run(model, [(True, False, 0)])
            fewer = other.state_dict()
        state, summary = seen.state_dict(), seen.summary("train")
        key = "plain/train/density/2"
        wrong: list[tuple[dict[str, Any], str]] = [
            (fewer, "missing gated/inference/gradient/0, .* and 5 more; not observed here nothing"),
            (
                {**state, "x/train/density/0": X},
                "missing nothing; not observed here x/train/density/0",
            ),
            ({**state, key: state[key].float()}, rf"{key} is torch.float32 \[\], but here .*int64"),
            ({**state, key: state[key].expand(2)}, rf"{key} is torch.int64 \[2\], but here"),
            ({**state, key: 3}, rf"{key} is no tensor"),
        ]
        for given_, message in wrong:
            with pytest.raises(ValueError, match=message):
                seen.load_state_dict(given_)
            assert seen.summary("train") == summary
    with observe(wide, inputs=X) as seen, observe(narrow, inputs=X) as other:
        narrow(X)
        with pytest.raises(
            ValueError, match=r"other sizes: 0/train/density/0 is .* \[6\], .* \[7\]"
        ):
            seen.load_state_dict(other.state_dict())
