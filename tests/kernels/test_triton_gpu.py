"""The Triton kernels as a GPU compiles them: ``TRITON_INTERPRET=0 pytest -m gpu`` on this file.

The laws are those of the interpreter's tests, at sizes of models.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actsparse.activations import named
from actsparse.kernels import accelerate, prepare, sparse_mlp
from actsparse.kernels import pack as packing
from tests.kernels import test_exactness as exactness
from tests.kernels import test_masks as masks

pytest.importorskip("triton")

from actsparse.kernels import triton_pack
from actsparse.kernels.triton_launch import INTERPRETED
from tests.kernels import test_triton_decode as decoding

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(INTERPRETED, reason="needs TRITON_INTERPRET=0"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
D, H = 768, 3072


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    with torch.device(DEVICE):
        torch.manual_seed(0)
        yield


def block(density: float, dtype: torch.dtype, gated: bool = False) -> dict[str, Tensor]:
    w = exactness.made(D, H, density)
    if gated:
        w |= {"gate": w["up"].flip(0), "gate_bias": w["bias"], "bias": torch.randn(H)}
    return {name: t.to(dtype) for name, t in w.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.2, 1.0])
@pytest.mark.parametrize("tokens", [1, 16, 17, 300])
def test_rms_error_is_at_most_four_times_dense(tokens: int, density: float, dtype: Any) -> None:
    """Of y without gradients, plain and screened, of y with them, and of each gradient."""
    eps, relu = torch.finfo(dtype).eps, named("relu")
    for gated in (False, True):
        w, grad_y = block(density, dtype, gated), torch.randn(tokens, D).to(dtype)
        leaves = [t.requires_grad_() for t in (torch.randn(tokens, D).to(dtype), *w.values())]
        wide = [t.detach().double().requires_grad_() for t in leaves]

        def run(f: Any, x: Tensor, *values: Tensor, w: Any = w, g: Tensor = grad_y) -> list[Tensor]:
            y = f(x, dict(zip(w, values, strict=True)))
            return [y, *torch.autograd.grad(y, [x, *values], g.to(y.dtype))]

        exact, plain = (run(lambda x, w: masks.dense(x, w, relu), *of) for of in (wide, leaves))
        ours = run(lambda x, w: sparse_mlp(x, **w), *leaves)
        with torch.no_grad():
            ours += [sparse_mlp(leaves[0], **w, screen=screen) for screen in (False, True)]
        exact, plain = exact + exact[:1] * 2, plain + plain[:1] * 2
        for true, its, mine in zip(exact, plain, ours, strict=True):
            assert mine.dtype == dtype
            error, other = ((t.double() - true).square().mean().sqrt() for t in (mine, its))
            assert error <= 4 * other + eps * true.abs().mean()


@pytest.mark.parametrize("tokens", [1, 16, 17, 300])
def test_bounds_hold_and_where_nothing_rounds_nothing_differs(tokens: int) -> None:
    for density, activation in ((0.0, "relu"), (0.1, "jsrelu"), (1.0, "squared_relu")):
        x, w = torch.randn(tokens, D), exactness.made(D, H, density)
        exactness.assert_bounds_hold(x, w, activation, screen=False)
    for activation, gated in itertools.product(masks.FUSED + masks.TWO_MASKS, (False, True)):
        masks.assert_same_as_float64(*masks.dyadic(tokens, 50, 400, gated), activation, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*decoding.KINDS, "channels"])
def test_no_active_unit_is_missed(kind: str, dtype: torch.dtype) -> None:
    for tokens, floor in itertools.product((1, 16), (0.0, 0.13)):
        x, up = decoding.rows_of(kind, tokens, D, H)
        if kind == "channels":
            x[:, :2] *= 30
        assert decoding.missed(*decoding.near(x, up, floor, dtype), floor)[0] == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tile_is_too_full(dtype: torch.dtype, fused: bool) -> None:
    for density in (0.0, 0.02, 0.25, 0.26, 0.9, 1.0):
        up = torch.where(torch.rand(1000, 1) < density, 1.0, -1.0).expand(-1, 64).contiguous()
        x = torch.randint(1, 3, (300, 1)).expand(-1, 64).contiguous().to(dtype)
        z = x.float() @ up.t()  # whole numbers to 128: exact in each dtype
        pointer, index, value = triton_pack.pack(x, up.to(dtype), None, 0.0, fused)
        want = packing.pack(z > 0)
        assert torch.equal(pointer, want[0])
        assert torch.equal(index, want[1])
        assert torch.equal(value.float(), z[z > 0])


def captured(run: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of ``run()`` after three calls that tune its kernels, and what it writes to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    return graph, y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("screen", [False, True], ids=["plain", "screen"])
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_graph_replays_what_a_call_computes(tokens: int, screen: bool, dtype: Any) -> None:
    """Also with more active units than when it was captured."""
    w, x = block(0.05, dtype, gated=True), torch.zeros(tokens, D).to(dtype)
    ready = prepare(w["down"], w["up"], w["gate"])
    with torch.no_grad():
        graph, y = captured(lambda: sparse_mlp(x, **w, screen=screen, prepared=ready))
        for scale in (1, 100):
            x.copy_(torch.randn(tokens, D) * scale)
            graph.replay()
            assert torch.equal(y, sparse_mlp(x, **w, screen=screen, prepared=ready))


def test_a_model_is_captured_and_autocast_is_left_to_its_layers() -> None:
    model = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))
    x = torch.randn(1, D)
    with torch.no_grad(), accelerate(model, inputs=x, mode="screened") as handle:
        graph, y = captured(lambda: model(x))
        x.copy_(torch.randn(1, D))
        graph.replay()
        assert torch.equal(y, model(x))
        calls = handle.table()[0]["calls"]
        assert set(calls) == {"screened"}
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            under = model(x)
        assert handle.table()[0]["calls"] == calls
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(under, model(x))
