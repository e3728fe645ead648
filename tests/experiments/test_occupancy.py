"""Occupancy against a brute-force count in float64, and its law with derivative density."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse import SwapActivation, observe, sparsify
from actsparse.activations import SShape, named, s_shape_of, shifted_s_shape
from actsparse.blocks import MLPBlock, find_mlp_blocks
from actsparse.observe import measure
from actsparse_lab.engine.occupancy import _CHUNK, intervals
from tests.observe.brute import D, H, Mlp, Recorder, same

SHIFTS = [(dx, dy) for dx in (-1.6, 0.0, 1.6) for dy in (-1.6, 0.0, 1.6)]
X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(1))
KEYS = ("zero_derivative", "zero_activation")


def model_of(*shapes: SShape, gated: bool = False, x: Tensor = X) -> nn.Module:
    """MLPs whose ReLU was swapped for S-shapes, by their names."""
    model = nn.Sequential(*(Mlp("relu", gated, H + i) for i in range(len(shapes)))).to(x.dtype)
    for block, shape in zip(find_mlp_blocks(model, x), shapes, strict=True):
        SwapActivation(shape.name).apply(block)
    return model


def root(shape: SShape) -> float:
    """Where φ is zero, by halving an interval; for dy = 0 the middle of where it is."""
    if shape.dy == 0:
        return shape.dx
    phi, low, high = named(shape.name).value, -64.0, 64.0
    for _ in range(100):
        middle = (low + high) / 2
        below = float(phi(torch.tensor(middle, dtype=torch.float64))) < 0
        low, high = (middle, high) if below else (low, middle)
    return low


def by_brute_force(
    recorder: Recorder, shapes: list[SShape], keep: Tensor | None = None
) -> dict[str, Any]:
    rows, counts, size = [], [0, 0], 0
    for name, shape in zip(recorder.blocks, shapes, strict=True):
        z = torch.cat(recorder.z[name]).double()
        z = z if keep is None else z[keep.reshape(-1)]
        found = []
        for centre in (shape.dx, root(shape)):
            inside = (z >= centre - shape.half_width) & (z <= centre + shape.half_width)
            found.append(int(inside.sum()))
        shares = {key: n / z.numel() for key, n in zip(KEYS, found, strict=True)}
        rows.append({"block": name, "tokens": len(z), **shares})
        counts = [a + b for a, b in zip(counts, found, strict=True)]
        size += z.numel()
    return {key: n / size for key, n in zip(KEYS, counts, strict=True)} | {"blocks": rows}


def check(
    model: nn.Module,
    shapes: list[SShape],
    x: Tensor = X,
    mask: Tensor | None = None,
    blocks: list[MLPBlock] | None = None,
) -> dict[str, Any]:
    blocks = blocks or find_mlp_blocks(model, x)
    with Recorder(blocks) as brute, observe(model, "occupancy", blocks=blocks, mask=mask) as seen:
        model(x)
    summary = seen.summary("train")
    assert summary is not None
    assert same(summary, by_brute_force(brute, shapes, mask))
    return summary


# --- what is counted -----------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("dx", "dy"), SHIFTS)
def test_counts_are_those_of_brute_force(dx: float, dy: float, gated: bool) -> None:
    """Three blocks of different widths, so that pooling them has to weigh."""
    shapes = [SShape(dx, dy), SShape(dx, dy, 0.75), SShape(-dx, dy, 2.0)]
    summary = check(model_of(*shapes, gated=gated), shapes)
    assert all(0 < summary[key] < 1 for key in KEYS)
    flat, silent = ([row[key] for row in summary["blocks"]] for key in KEYS)
    assert (flat == silent) == (dy == 0)


@pytest.mark.parametrize(("dx", "dy"), SHIFTS)
def test_the_centre_of_the_second_interval_is_the_root_of_phi(dx: float, dy: float) -> None:
    shape = SShape(dx, dy)
    flat, silent = (torch.tensor(ends, dtype=torch.float64) for ends in intervals(shape))
    phi = named(shape.name)
    # the middle of an interval is off by a few ε · 6, and φ by its slope there, 2 √1.6, times that
    assert float(phi.value(silent.mean()).abs()) < 100 * torch.finfo(torch.float64).eps
    assert float(silent.diff() - flat.diff()) == pytest.approx(0.0, abs=1e-14)  # some ε · 8
    assert not bool(phi.derivative(flat * (1 - 1e-9) + flat.flip(0) * 1e-9).any())
    assert bool((phi.derivative(flat + torch.tensor([-1e-9, 1e-9])) > 0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ends_of_intervals_count_and_what_is_next_to_them_does_not(dtype: torch.dtype) -> None:
    """Ends are sums of powers of two here, so they are the same number in every dtype."""
    shape = SShape(0.5, -4.0, 0.5)
    (low, high), (low_a, high_a) = intervals(shape)
    assert (low, high, low_a, high_a) == (0.0, 1.0, 2.5, 3.5)
    ends = torch.tensor([low, high, low_a, high_a], dtype=dtype)
    past = torch.tensor([-9.0, 9.0, -9.0, 9.0], dtype=dtype)
    beside = torch.nextafter(ends, past)
    nan = torch.full((4,), float("nan"), dtype=dtype)
    assert found_at(shape, torch.stack([ends, beside, nan])) == [2 / 12, 2 / 12]


def found_at(shape: SShape, z: Tensor) -> list[float]:
    """Shares of z [tokens, H], passed through a block whose up layer is the identity."""
    up, down = (nn.Linear(z.shape[1], z.shape[1], bias=False) for _ in range(2))
    nn.init.eye_(up.weight)
    model = nn.Sequential(up, nn.ReLU(), down).to(z.dtype)
    with observe(model, "occupancy", inputs=z[:1]) as seen:
        SwapActivation(shape.name).apply(next(iter(seen.blocks.values())))
        # NaN times 0 would reach every unit of its row
        up.register_forward_hook(lambda module, args, output: args[0])
        model(z)
    summary = seen.summary("train")
    assert summary is not None
    return [summary[key] for key in KEYS]


def test_a_bfloat16_z_is_compared_as_it_is_and_with_the_ends_as_they_are() -> None:
    """In bfloat16 the end 1.6 + 1.5 would be 3.09375, and 1.6 − 1.5 would be 0.10009765625."""
    z = torch.tensor([[3.09375, 3.109375, 0.10009765625, 0.099609375]], dtype=torch.bfloat16)
    assert found_at(SShape(1.6, -1.6), z)[0] == 2 / 4
    # and an end that bfloat16 rounds outwards: 1.5 + 0.51 is 2.015625, beyond 2.01
    z = torch.tensor([[2.0, 2.015625]], dtype=torch.bfloat16)
    assert found_at(SShape(0.51, -1.6), z)[0] == 1 / 2


@pytest.mark.parametrize("n", [1, _CHUNK - 1, _CHUNK, _CHUNK + 1, 3 * _CHUNK + 200])
def test_any_number_of_rows(n: int) -> None:
    shapes = [SShape(1.6, -1.6)]
    check(model_of(*shapes), shapes, torch.randn(1, n, D))


def test_images_keep_their_axes_and_an_empty_batch_counts_nothing() -> None:
    shapes = [SShape(1.6, -1.6)]
    check(model_of(*shapes), shapes, torch.randn(2, 5, 4, D))
    model = model_of(*shapes)
    with observe(model, "occupancy", inputs=X) as seen:
        model(X[:0])
    assert seen.summary("train") is None


def test_tokens_that_a_mask_leaves_out_do_not_count() -> None:
    shapes, x, keep = [SShape(-1.6, 1.6)] * 2, torch.randn(30, 41, D), torch.rand(30, 41) < 0.6
    model = model_of(*shapes, x=x)
    assert check(model, shapes, x, keep) != check(model, shapes, x)
    with observe(model, "occupancy", inputs=x, mask=torch.zeros(30, 41)) as seen:
        model(x)
    assert seen.summary("train") is None


# --- the law -------------------------------------------------------------------------------------

shifts = st.floats(-2, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(
    st.builds(SShape, shifts, shifts, st.floats(0.125, 2)),
    st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=24),
)
def test_zero_derivative_is_one_minus_derivative_density(
    dtype: torch.dtype, shape: SShape, values: list[float]
) -> None:
    """Away from the ends, where z − dx rounds to one side or the other."""
    # φ′ rounds dx, z − dx, h and what is left of them, ends are rounded sums: each by half an ε of
    # at most 8 + 2 + 2
    near = 4 * torch.finfo(dtype).eps * 12
    ends = [shape.dx - shape.half_width, shape.dx + shape.half_width]
    values = [z for z in values if all(abs(z - end) > near for end in ends)]
    assume(values)
    z = torch.tensor([values], dtype=dtype)
    phi = shifted_s_shape(*shape)
    sloped = int((phi.derivative(z) != 0).sum())
    low, high = intervals(shape)[0]
    inside = sum(low <= value <= high for value in values)
    assert inside == len(values) - sloped


@given(st.sampled_from(SHIFTS), st.integers(1, 4), st.integers(1, 9), st.booleans())
def test_the_law_holds_of_the_two_measures(
    shift: tuple[float, float], batch: int, length: int, gated: bool
) -> None:
    shapes, x = [SShape(*shift)] * 2, torch.randn(batch, length, D, dtype=torch.float64)
    model = model_of(*shapes, gated=gated, x=x)
    with observe(model, ["density", "occupancy"], inputs=x) as seen:
        model(x)
    summary = seen.summary("train")
    assert summary is not None
    for row in (summary, *summary["blocks"]):  # two quotients of whole numbers: 1 − q rounds
        assert row["zero_derivative"] == pytest.approx(1 - row["derivative_density"], abs=1e-15)
        assert row["density"] == 1.0 or shift[1] == 0


# --- through the seam ----------------------------------------------------------------------------


def test_train_and_eval_mode_beside_density_and_gradients() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(Mlp("relu"), Mlp("relu", gated=True))
    shapes = [SShape(1.6, -1.6)] * 2
    handle = sparsify(model, SwapActivation(to="s_shape(dx=1.6, dy=-1.6)"), inputs=X)
    blocks = list(handle.blocks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.attach(optimizer, steps=2)
    counted: dict[str, Any] = {}
    with observe(model, ["density", "flatness", "gradient", "occupancy"], blocks=blocks) as seen:
        with Recorder(blocks) as brute:
            model(X).square().mean().backward()
        counted["train"] = by_brute_force(brute, shapes)
        optimizer.step()
        model.eval()
        with Recorder(blocks) as brute, torch.no_grad():
            model(2 * X)
        counted["inference"] = by_brute_force(brute, shapes)
    assert counted["train"]["zero_derivative"] != counted["inference"]["zero_derivative"]
    for phase, want in counted.items():
        found = seen.summary(phase)  # type: ignore[arg-type]
        assert found is not None
        got = {key: found[key] for key in KEYS}
        got["blocks"] = [{key: row[key] for key in ("block", "tokens", *KEYS)}
                         for row in found["blocks"]]  # fmt: skip
        assert same(got, want)
        assert found["zero_derivative"] == pytest.approx(1 - found["derivative_density"])
        assert found["density"] == 1.0  # φ is zero at one point only
        assert f"{found['zero_activation']:.2%}" in str(seen)
    train = seen.summary("train")
    assert train is not None  # of φ′ by its formula: the identity knows no other
    assert train["density_from_flatness"] == pytest.approx(train["derivative_density"], rel=1e-4)
    handle.remove()


def test_the_active_door_counts_too() -> None:
    model, shapes = model_of(SShape(-1.6, -1.6)), [SShape(-1.6, -1.6)]
    want = check(model, shapes)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        out: Tensor = model(batch).square().mean()
        return out

    found = measure(model, loss_fn, [X[:1], X[1:]], "occupancy", inputs=X)
    assert found.measures == want
    assert "z where φ′ = 0" in str(found)


@pytest.mark.parametrize("function", [False, True])
def test_compiled_whole(function: bool) -> None:
    """With padding that the model itself knows of, too."""
    torch._dynamo.reset()
    if function:
        layer = nn.TransformerEncoderLayer(D, 2, H, batch_first=True, activation="relu")
        model: nn.Module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[0, 2:] = True
        inputs: Any = {"src": X, "src_key_padding_mask": padding}
        sparsify(model, SwapActivation("s_shape(dx=1.6, dy=-1.6)"), inputs=inputs)
    else:
        model, inputs, padding = model_of(SShape(1.6, -1.6)), {"input": X}, None
    blocks = find_mlp_blocks(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.manual_seed(1)
    with observe(compiled, "occupancy", blocks=blocks) as seen:
        compiled(**inputs)
    torch._dynamo.reset()
    torch.manual_seed(1)
    with observe(model, "occupancy", blocks=blocks) as eager, Recorder(blocks) as brute:
        model(**inputs)
    assert seen.summary("train") == eager.summary("train")
    keep = None if padding is None else ~padding
    want = by_brute_force(brute, [SShape(1.6, -1.6)] * len(blocks), keep)
    assert same(eager.summary("train"), want)


def test_inference_mode_and_normal_mode_mix() -> None:
    model = model_of(SShape(1.6, 1.6)).eval()
    with torch.inference_mode():
        seen = observe(model, "occupancy", inputs=X)
        model(X)
    once = seen.summary("inference")
    model(X)
    twice = seen.summary("inference")
    seen.close()
    assert once is not None
    assert twice is not None
    assert [twice[key] for key in KEYS] == [once[key] for key in KEYS]
    assert twice["blocks"][0]["tokens"] == 2 * once["blocks"][0]["tokens"] == 2 * 15


def test_states_add_up_come_back_and_are_forgotten() -> None:
    model = model_of(SShape(1.6, -1.6), SShape(1.6, -1.6))
    blocks = find_mlp_blocks(model, X)
    states, summaries, seen = [], [], observe(model, "occupancy", blocks=blocks)
    for part in (X, X[:1], X[1:]):
        model(part)
        states.append(seen.state_dict())
        summaries.append(seen.summary("train"))
        seen.reset()
    whole = summaries[0]
    assert seen.summary("train") is None
    total = {key: (states[1][key] + states[2][key]) for key in states[0]}  # two processes
    assert all(torch.equal(total[key], states[0][key]) for key in total)
    assert {tensor.dtype for tensor in total.values()} == {torch.int64}
    model(X)  # which loading forgets
    seen.load_state_dict(total)
    assert seen.summary("train") == whole
    copied = copy.deepcopy(model)
    copied(X)
    assert seen.summary("train") == whole
    model(X)
    assert seen.summary("train")["blocks"][0]["tokens"] == 2 * 15  # type: ignore[index]
    seen.close()


# --- no S-shape ----------------------------------------------------------------------------------


class Odd(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.sin(z)


@pytest.mark.parametrize(
    ("phi", "said"), [(nn.ReLU(), "relu"), (Odd(), "mixed, or has no name")], ids=["relu", "none"]
)
def test_another_activation_is_named_when_it_should_be_counted(phi: nn.Module, said: str) -> None:
    model = nn.Sequential(nn.Linear(D, H), phi, nn.Linear(H, D))
    expected = model(X)
    (block,) = find_mlp_blocks(model, X)
    with observe(model, ["density", "occupancy"], inputs=X) as seen:
        with pytest.raises(ValueError, match=rf"φ of block '{block.name}' is {said}.*s_shape\(dx"):
            model(X)
        assert "zero_derivative" not in (seen.summary("train") or {})
        handle = sparsify(model, SwapActivation("s_shape(dx=1.6, dy=-1.6)"), inputs=X)
        seen.reset()
        model(X)  # now it can
        assert 0 < seen.summary("train")["zero_derivative"] < 1  # type: ignore[index]
    handle.remove()
    assert torch.equal(model(X), expected)


def test_a_mixture_is_no_s_shape_until_it_is_done() -> None:
    model = nn.Sequential(Mlp("relu"))
    handle = sparsify(model, SwapActivation("s_shape(dx=1.6, dy=-1.6)", mix=2), inputs=X)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.attach(optimizer, steps=4)
    with observe(model, "occupancy", blocks=handle.blocks) as seen:
        with pytest.raises(ValueError, match="mixed"):
            model(X)
        for _ in range(2):
            optimizer.step()
        model(X)
    assert seen.summary("train") is not None


def test_the_plain_s_shape_of_a_models_own_is_one() -> None:
    """Found by its values: dx = dy = 0, where the zeros of φ and φ′ are the same."""
    model = nn.Sequential(Mlp("s_shape"))
    shape = s_shape_of("s_shape")
    assert shape is not None
    summary = check(model, [shape])
    assert summary["zero_derivative"] == summary["zero_activation"]
