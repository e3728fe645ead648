"""Blocks in bfloat16 and under autocast run by the kernels, as exact as dense bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from actsparse.kernels import accelerate, backends

pytestmark = pytest.mark.skipif(not backends.loaded(), reason="no compiled kernels here")
D, H, T = 96, 640, 50


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Dropout(0.1), nn.Linear(H, D)).eval()
    nn.init.constant_(model[0].bias, -0.7)
    return model


def results(model: nn.Module, x: Tensor, cast: bool) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype))
    return [y.detach(), *(p.grad.clone() for p in (x, *model.parameters()) if p.grad is not None)]


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("mode", ["sparse", "screened"])
def test_results_are_as_near_to_float64_as_dense_ones(mode: str, cast: bool) -> None:
    model, x = mlp(), torch.randn(2, T // 2, D)
    if not cast:
        model, x = model.bfloat16(), x.bfloat16()
    exact = results(copy.deepcopy(model).double(), x.double(), False)
    dense = results(model, x, cast)
    handle = accelerate(model, inputs=x, mode=mode)
    found = results(model, x, cast)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
        found.append(model(x))
    assert {row["program"] for row in handle.table()} == {mode}
    for ours, theirs, right in zip(found, [*dense, dense[0]], [*exact, exact[0]], strict=True):
        assert ours.dtype is theirs.dtype
        off = [float((t.double() - right).norm()) for t in (ours, theirs)]
        assert off[0] <= 1.3 * off[1] + 1e-6 * float(right.norm())


def test_copies_follow_weights_under_autocast() -> None:
    model, x = mlp(), torch.randn(T, D)
    handle = accelerate(model, inputs=x, mode="screened")
    with torch.no_grad():
        for cast in (True, False, True):  # one kind of call for each dtype
            model[3].weight.mul_(-1.5)
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                y = model(x)
            assert y.dtype is (torch.bfloat16 if cast else torch.float32)
            hidden = torch.relu(x @ model[0].weight.t() + model[0].bias)
            want = hidden @ model[3].weight.t() + model[3].bias
            assert torch.allclose(y.float(), want, atol=0.02 if cast else 1e-5)
    assert [row["program"] for row in handle.table()] == ["screened", "screened"]


def test_what_backward_keeps_is_a_fraction_of_dense_float32() -> None:
    model, x = mlp().bfloat16(), torch.randn(T, D).bfloat16()
    active = int((model[0](x) > 0).sum())
    accelerate(model, inputs=x, mode="screened")
    own = {p.data_ptr() for p in (x, *model.parameters())}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x)
    pointer = 8 * (T * 2 + 1)  # two blocks of 384 units
    assert sum(kept.values()) == 4 * active + pointer  # 2 bytes an index, 2 a value
