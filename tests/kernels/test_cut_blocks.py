"""Blocks whose φ is cut at thresholds run by the kernels, as their layers do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsparse import find_mlp_blocks
from actsparse.activations import named
from actsparse.blocks.site import site_of
from actsparse.blocks.stages import Cut, keep_above
from actsparse.kernels import Accelerated, accelerate, backends, dense
from actsparse.kernels.choose import Trials
from actsparse.kernels.programs import Weights, run

D, H = 64, 500


class Gated(nn.Module):
    def __init__(self, d: int = D, h: int = H) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(d, h), nn.Linear(d, h, bias=False)
        self.down, self.act = nn.Linear(h, d), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    def __init__(self, d: int = D, h: int = H) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(d, h), nn.Linear(h, d), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class CutPhi:
    """A φ with thresholds of its own."""

    function = None

    def __init__(self, threshold: Tensor, product: bool = False) -> None:
        self.cut = Cut("silu", threshold, product)

    def __call__(self, z: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        v = own(z)
        return v if self.cut.product else keep_above(v, self.cut.threshold)

    def derivative(self, z: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        return own(z).masked_fill(named("silu").value(z).abs() <= self.cut.threshold, 0)


def ready(model: nn.Module, x: Tensor, phi: CutPhi, **how: object) -> Accelerated:
    blocks = find_mlp_blocks(model, inputs=x)
    site_of(blocks[0]).replace_activation(phi)
    return accelerate(model, blocks=blocks, **how)  # type: ignore[arg-type]


def by_layers(model: nn.Module, x: Tensor, threshold: Tensor, product: bool = False) -> Tensor:
    gated = isinstance(model, Gated)
    first = model.gate if gated else model.up
    v = a = F.silu(F.linear(x, first.weight, first.bias))
    if gated:
        a = a * F.linear(x, model.up.weight)
    a = torch.where((a if product else v).abs() <= threshold, 0, a)
    return F.linear(a, model.down.weight, model.down.bias)


def results(model: nn.Module, y: Tensor, x: Tensor) -> list[Tensor]:
    grads = torch.autograd.grad(
        y, [x, *model.parameters()], torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    )
    return [y.detach(), *grads]


@pytest.mark.parametrize("made", [Gated, Plain])
@pytest.mark.parametrize("mode", ["sparse", "screened"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_give_the_results_of_their_layers(
    made: type[nn.Module], mode: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model, x = made().to(dtype), torch.randn(2, 20, D).to(dtype).requires_grad_()
    t = torch.rand(H) * 0.3
    handle = ready(model, x, CutPhi(t), mode=mode)
    double = copy.deepcopy(model).double()
    x64 = x.detach().double().requires_grad_()
    got = results(model, model(x), x)
    if dtype is torch.float32:
        want = results(double, by_layers(double, x64, t), x64)
        for ours, right in zip(got, want, strict=True):
            torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-4)
    for tokens in (x.detach(), x[0, :1].detach()):
        with torch.no_grad():
            y = model(tokens)
            plain = by_layers(model, tokens, t)
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(y, plain, rtol=tolerance, atol=tolerance)
    rows = handle.table()
    assert {row["program"] for row in rows} == {mode}
    assert all(0.05 < row["density"] < 0.9 for row in rows)
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(y, model(x[0, :1]), rtol=tolerance, atol=tolerance)


def test_thresholds_may_change_between_calls_and_the_product_may_be_cut() -> None:
    torch.manual_seed(1)
    model, x = Gated(), torch.randn(1, D)
    phi = CutPhi(torch.full((H,), 0.1))
    handle = ready(model, x, phi, mode="sparse")
    for product in (False, True):
        for level in (0.1, 0.2, 0.3, 1e9):
            phi.cut = Cut("silu", torch.full((H,), level), product)
            with torch.no_grad():
                y = model(x)
                want = by_layers(model, x, phi.cut.threshold, product)
            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
    phi.cut.threshold.fill_(0.15)  # in place
    with torch.no_grad():
        want = by_layers(model, x, torch.full((H,), 0.15), True)
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)
    assert {row["program"] for row in handle.table()} == {"sparse"}


@pytest.mark.skipif(not backends.loaded(), reason="no compiled kernels here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "level"), [(1, 0.12), (1, 0.25), (40, 0.25)])
def test_auto_times_sparse_against_every_dense_program_with_the_cut(
    tokens: int, level: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    model, x = Gated(512, 2048).to(dtype), torch.randn(tokens, 512).to(dtype)
    handle = ready(model, x, CutPhi(torch.full((2048,), level)), mode="auto")
    seen: dict[str, Tensor] = {}
    real = Trials.run

    def watched(
        self: Trials, kind: object, density: float, programs: dict, *rest: object
    ) -> object:
        seen.update({name: program()[0] for name, program in programs.items()})
        return real(self, kind, density, programs, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Trials, "run", watched)
    with torch.no_grad():
        for _ in range(4):
            y = model(x)
        want = by_layers(model, x, torch.full((2048,), level))
    rivals = {"dense", "packed", "sparse"} | ({"onednn"} if dtype is torch.float32 else set())
    assert set(seen) == rivals
    near = 1e-4 if dtype is torch.float32 else 3e-2
    for each in (y, *seen.values()):
        torch.testing.assert_close(each, want, rtol=near, atol=near)
    (row,) = handle.table()
    assert row["reason"] is None
    assert (0.5 < row["density"] < 0.8) if level < 0.2 else (0.1 < row["density"] < 0.5)


@pytest.mark.parametrize("program", ["onednn", "packed"])
@pytest.mark.parametrize("product", [False, True])
def test_dense_programs_cut_in_inference_and_training(program: str, product: bool) -> None:
    if not dense.has_onednn():
        pytest.skip("this PyTorch has no oneDNN")
    torch.manual_seed(3)
    model, x, t = Gated(), torch.randn(9, D, requires_grad=True), torch.rand(H) * 0.2
    weights = Weights(model.up.weight, None, model.down.weight, model.down.bias,
                      model.gate.weight, model.gate.bias)  # fmt: skip
    wanted = by_layers(model, x, t, product)
    if program == "packed":
        with torch.no_grad():
            y = run(program, x, weights, Cut("silu", t, product))
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
        return
    y = run(program, x, weights, Cut("silu", t, product))
    for ours, right in zip(results(model, y, x), results(model, wanted, x), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


def test_what_is_no_threshold_is_refused() -> None:
    model, x = Gated(), torch.randn(3, D)
    ready(model, x, CutPhi(torch.zeros(H, dtype=torch.float64)), mode="sparse")
    with pytest.raises(ValueError, match=r"threshold must be torch.float32 \[500\]"):
        model(x)
    with torch.no_grad(), pytest.raises(ValueError, match="threshold must be"):
        model(x)


@pytest.mark.parametrize("form", ["gate", "product", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thresholds_in_bfloat16_are_those_numbers(form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Gated().to(dtype), torch.randn(3, D).to(dtype)
    weights = Weights(
        model.up.weight, model.up.bias, model.down.weight, model.down.bias, model.gate.weight,
        model.gate.bias,
    )  # fmt: skip
    t = torch.rand((2, H) if form == "both" else H).to(torch.bfloat16) / 4
    ys = []
    for level in (t, t.float()):
        with torch.no_grad():
            cut = Cut("silu", level, form == "product")
            ys += [run("sparse", x, weights, cut, prepared=p) for p in (weights.prepare(), None)]
    assert torch.equal(ys[0], ys[2])
    assert torch.equal(ys[1], ys[3])
    torch.testing.assert_close(ys[0], ys[1])
    assert not torch.equal(ys[0], run("sparse", x, weights, Cut("silu", 0 * t, False)))


@pytest.mark.parametrize("function", [nn.SiLU, nn.GELU])
def test_dense_mode_runs_a_phi_without_zeros_and_auto_refuses_it(function: type[nn.Module]) -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(64, 512), function(), nn.Linear(512, 64)).eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        y = mlp(x)
        with accelerate(mlp, inputs=x, mode="dense"):
            for _ in range(4):
                torch.testing.assert_close(mlp(x), y)
        with pytest.raises(ValueError, match="never exactly zero"):
            accelerate(mlp, inputs=x)
