"""The weight of a penalty while training goes on: its ramp, and when it is 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from actsparse import ActivationPenalty, sparsify
from actsparse.blocks.site import site_of

D, H = 8, 12
EPS64 = torch.finfo(torch.float64).eps


def block() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)).double()


def stream() -> Tensor:
    return torch.randn(2, 5, D, dtype=torch.float64)


def test_the_weight_follows_its_ramp() -> None:
    model, x = block(), stream()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = sparsify(model, ActivationPenalty("l1", weight=2.0, ramp=0.5), inputs=x)
    handle.attach(optimizer, steps=8)
    seen: list[Tensor] = []
    model[2].register_forward_hook(lambda *hook: seen.append(hook[-1]))
    shares = []
    for _ in range(6):
        model(x)
        shares.append(handle.penalty().item() / seen[-1].abs().mean().item())
        optimizer.step()
    assert shares == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.0], rel=8 * H * EPS64)


def test_a_penalty_that_weighs_nothing_asks_for_nothing() -> None:
    model, x = block(), stream()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = sparsify(model, ActivationPenalty("l1", ramp=1), inputs=x)
    handle.attach(optimizer, steps=3)
    site, read = site_of(handle.blocks[0]), []
    for _ in range(3):
        model(x)
        read.append((bool(site.wanted), handle.penalty().requires_grad))
        optimizer.step()
    assert read == [(False, False), (True, True), (True, True)]
    handle.load_state_dict({"step": 0, "steps": 3})
    model(x)
    assert not site.wanted
    assert not handle.penalty().requires_grad


def test_a_penalty_that_no_loss_has_is_told_once() -> None:
    model, x = block(), stream()
    handle = sparsify(model, ActivationPenalty("l1"), inputs=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.attach(optimizer)

    def step(*, penalised: bool, passes: int = 1) -> None:
        for _ in range(passes):
            loss = model(x).square().mean()
            (loss + handle.penalty() if penalised else loss).backward()
        optimizer.step()

    step(penalised=True)
    step(penalised=True, passes=2)  # accumulation
    with torch.no_grad():
        model(x)  # a pass that trains nothing
    optimizer.step()
    with pytest.warns(UserWarning, match=r"before backward: loss = loss \+ handle\.penalty\(\)"):
        step(penalised=False)
    step(penalised=False)  # warnings are errors here


def test_best_is_the_default_and_trains() -> None:
    """JSReLU, L1 and a ramp that needs the number of steps."""
    model, x = block(), stream()
    handle = sparsify(model, inputs=x)
    assert [type(each).__name__ for each in handle.recipe.modifications] == [
        "SwapActivation", "ActivationPenalty",
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="needs the number of steps"):
        handle.attach(optimizer)
    handle.attach(optimizer, steps=40)
    before = model[2](model[1](model[0](x))).abs().mean()
    for _ in range(40):
        optimizer.zero_grad()
        handle.penalty()  # nothing is pending
        model(x)
        handle.penalty().backward() if handle.step else None
        optimizer.step()
    assert model[2](model[1](model[0](x))).abs().mean() < before / 2
