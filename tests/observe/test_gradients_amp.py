"""Measures of gradients in mixed precision: autocast, loss scaling, overflow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actsparse.observe import observe
from tests.observe.test_gradient import expected
from tests.observe.test_gradients import (
    ALL,
    MESSAGE,
    B,
    Net,
    T,
    X,
    close,
    found,
    losses,
    net,
    numbers,
    plain,
)


def captured(model: Net, run: Callable[[], Any]) -> list[dict[str, Tensor]]:
    """What autograd passed at each block, gathered by hooks of the test's own."""
    kept: list[dict[str, Tensor]] = [{} for _ in model.layers]
    handles = []
    for layer, into in zip(model.layers, kept, strict=True):
        places = [("x", "z", layer.up), ("_", "f", layer.act), ("d", "y", layer.down)]
        for entering, leaving, module in places:

            def hook(
                module: nn.Module,
                args: Any,
                out: Tensor,
                into: dict[str, Tensor] = into,
                entering: str = entering,
                leaving: str = leaving,
            ) -> None:
                into[entering], into[leaving] = args[0].detach(), out.detach()
                out.register_hook(lambda g: into.__setitem__(f"g_{leaving}", g.detach()))

            # in front of the site's: what the model computed itself
            handles.append(module.register_forward_hook(hook, prepend=True))
    run()
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
def test_under_autocast_sums_are_of_the_gradients_that_flowed(
    dtype: torch.dtype, act: type[nn.Module]
) -> None:
    model, x, scale = net((act, False), depth=1).float(), X.float(), 64.0

    def run() -> None:
        with torch.autocast("cpu", dtype):
            loss = losses(model(x).float()).mean() * scale
        loss.backward()

    with observe(model, ALL, inputs=x, loss_scale=scale) as seen:
        (kept,) = captured(model, run)
    assert kept["g_z"].dtype == kept["z"].dtype == dtype
    t = {name: value.double() for name, value in kept.items()}
    g = {name: t[f"g_{name}"] * (B / scale) for name in ("z", "f", "y")}
    got = found(seen)
    every = torch.ones(B, T, dtype=torch.bool)
    name = "relu" if act is nn.ReLU else "gelu"
    want = expected(t["z"], g["z"], g["f"], name, every)
    want["flatness_up"] = float((g["z"].square().sum(-1) * t["x"].square().sum(-1)).sum() / B)
    want["flatness_down"] = float((g["y"].square().sum(-1) * t["d"].square().sum(-1)).sum() / B)
    each = torch.einsum("bth,btd->bhd", g["z"], t["x"]).flatten(1)
    trace = float(each.var(0).sum())
    want["noise_scale"] = trace / (float(each.mean(0).square().sum()) - trace / B)
    # Rows of at most 24 entries are summed in float32: 24·2⁻²⁴ relative to what is positive, and
    # twice that in squares. The noise scale cancels by 1 + scale/n, below 10 here. One rounding
    # to bfloat16 would be 2⁻⁹, to float16 2⁻¹².
    assert 0 < want["noise_scale"] < 9 * B
    assert {key: got[key] for key in want} == pytest.approx(want, rel=10 * 2 * 24 * 2**-24)


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
def test_autocast_is_near_full_precision(act: type[nn.Module]) -> None:
    model, x = net((act, False)).float(), X.float()
    want = plain(model, x)
    with observe(model, ALL, inputs=x) as seen, torch.autocast("cpu", torch.bfloat16):
        losses(model(x).float()).mean().backward()
    # bfloat16 rounds by 2⁻⁹. A block's two products round weights, inputs and outputs, the
    # activation once more: 7 roundings forward, 7 backward, so at most 28 in two blocks of the
    # same sign, and twice that in squares of gradient and input: 4·28·2⁻⁹.
    bound = 4 * 28 * 2**-9
    keys = ("flatness_up", "flatness_down", "gradient_l2", "input_norm", "down_input_norm")
    for key in (*keys, "coefficient"):
        assert found(seen)[key] == pytest.approx(want[key], rel=bound)
        assert found(seen)[key] != want[key]


def test_the_scale_of_amp_is_asked_for_and_an_overflow_adds_nothing() -> None:
    """Powers of two are exact, and so are the sums; float64 has room for all of them."""
    model, x = net(), X.split(2)
    with observe(model, ALL, inputs=X) as want:
        for part in (x[0], x[2]):
            losses(model(part)).mean().backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scales = []
    with observe(model, ALL, inputs=X, loss_scale=scaler) as seen:
        for i, part in enumerate(x):
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
            loss = losses(model(part)).mean() * (math.inf if i == 1 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert scales == [2.0**10, 2.0**11, 2.0**10]  # grown, then cut after the overflow
    got, whole = found(seen), found(want)
    assert [row.pop("skipped") for row in (got, *got["blocks"])] == [1, 1, 1]
    assert [row.pop("skipped") for row in (whole, *whole["blocks"])] == [0, 0, 0]
    # the forward of the pass that overflowed was a pass like others to density
    density = plain(model)
    for row, other, all in zip(
        (got, *got["blocks"]),
        (whole, *whole["blocks"]),
        (density, *density["blocks"]),
        strict=True,
    ):
        for key in ("density", "derivative_density", "dead", "living_density", "tokens"):
            if key in row:
                other[key] = all[key]
    assert numbers(got) == close(whole)


def test_a_pass_that_overflows_in_half_precision_is_skipped() -> None:
    model, x = net().float(), X.float()
    with observe(model, ALL[1:], inputs=x, loss_scale=2.0**24) as seen:
        with torch.autocast("cpu", torch.float16):
            loss = losses(model(x).float()).mean() * 2.0**24
        loss.backward()  # float16 ends at 2^16
        assert seen.summary("train") is None
        seen.weighing.scale = 1.0
        with torch.autocast("cpu", torch.float16):
            loss = losses(model(x).float()).mean()
        loss.backward()
    assert found(seen)["skipped"] == 1
    assert found(seen)["samples"] == B
    assert math.isfinite(found(seen)["noise_scale"])


@pytest.mark.filterwarnings(MESSAGE)
def test_compiled_under_autocast_noise_keeps_its_precision() -> None:
    """A compiled backward is traced under the forward's autocast."""
    torch._dynamo.reset()
    model, x = net(depth=1).float(), X.float()
    summaries = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        with observe(model, "noise", inputs=x) as seen:
            with torch.autocast("cpu", torch.bfloat16):
                y = run(x)
            losses(y.float()).mean().backward()
        summaries.append(found(seen))
    torch._dynamo.reset()
    # the same roundings of the model; products of bfloat16 would be off by 2⁻⁹
    assert numbers(summaries[0]) == close(summaries[1], rel=1e-6)
