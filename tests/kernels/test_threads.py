"""Threads that run one model, while another thread finds, attaches and removes on a second one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from actsparse import SwapActivation, ZerothBias, accelerate, find_mlp_blocks, observe, sparsify
from actsparse.kernels import build

D, H, THREADS = 32, 512, 4


class Block(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(D), nn.Linear(D, H), nn.GELU()
        self.gate = nn.Linear(D, H) if gated else None
        self.down = nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        a = self.act(self.up(h)) if self.gate is None else self.act(self.gate(h)) * self.up(h)
        return x + self.down(a)


def network() -> nn.Module:
    return nn.Sequential(Block(False), Block(True), Block(False), Block(True)).eval()


def prepared(x: Tensor) -> nn.Module:
    """Sparsified, its zeroth biases and silent units drawn."""
    model = network()
    handle = sparsify(model, [ZerothBias(), SwapActivation("jsrelu")], inputs=x)
    for block in handle.blocks:
        block.up.module.actsparse.zeroth_bias.normal_()
        assert block.pre_activation.bias is not None
        block.pre_activation.bias.sub_(0.5)
    return model.eval()


@pytest.fixture(autouse=True)
def one_thread_a_call() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # else this test would be one of the machine's patience
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(build.level() == "reference", reason="no compiled kernels here")
@pytest.mark.parametrize("calls", [48, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["sparse", "screened", "auto"])
def test_threads_get_their_own_answers(
    mode: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actsparse.kernels.plan.LEAST", 0)
    inputs = [torch.randn(1 + i % 5, 7, D) for i in range(8)]
    assert calls % len(inputs) == 0  # every thread calls each as often
    model = prepared(inputs[0])
    blocks = find_mlp_blocks(model, inputs[0])
    # a block that is observed runs by its layers, the others sparse
    fixed = accelerate(model, blocks=blocks, mode="sparse" if mode == "auto" else mode)
    with observe(model, "density", blocks=blocks[:1]), fixed:
        want = [model(x) for x in inputs]
    with observe(model, "density", blocks=blocks[:1]) as alone:
        for x in inputs:
            model(x)
    stop, done = threading.Event(), [0]

    def disturb() -> None:
        second, x = network(), torch.randn(2, 3, D)
        while not stop.is_set():
            found = find_mlp_blocks(second, x)
            handle = sparsify(second, [SwapActivation("relu")], blocks=found)
            with torch.no_grad(), observe(second, blocks=found), accelerate(second, mode="sparse"):
                second(x)
            handle.remove()
            done[0] += 1

    def call(thread: int) -> int:
        wrong = 0
        with torch.no_grad():
            for i in range(calls):
                k = (i + thread) % len(inputs)
                y = model(inputs[k])
                # in auto blocks choose apart: one of the programs, to rounding
                auto = mode == "auto" and torch.allclose(y, want[k], rtol=1e-4, atol=1e-5)
                wrong += not (auto or torch.equal(y, want[k]))
        return wrong

    disturber = threading.Thread(target=disturb)
    with observe(model, "density", blocks=blocks[:1]) as seen:
        handle = accelerate(model, blocks=blocks, mode=mode)
        disturber.start()
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                wrong = list(pool.map(call, range(THREADS)))
        finally:
            stop.set()
            disturber.join()
    assert wrong == [0] * THREADS
    assert done[0] > 0
    ran = {program for row in handle.table() for program in row["calls"]}
    assert ran >= ({"dense"} if mode == "auto" else {"dense", mode})
    row, one = (s.summary("inference")["blocks"][0] for s in (seen, alone))
    each = THREADS * calls // len(inputs)
    assert row["tokens"] == each * one["tokens"]
    assert row["density"] == one["density"]
