"""Finders in several threads, and a finder beside threads that run models."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from actsparse import find_mlp_blocks

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def model_of(depth: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(depth))
    )


def together(*jobs: Callable[[], None]) -> None:
    """Run each in a thread of its own, and raise what one of them raised."""
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def test_finders_of_one_model_and_of_others_do_not_disturb_each_other() -> None:
    models = {depth: model_of(depth).train() for depth in (1, 2, 3)}

    def finds(depth: int) -> Callable[[], None]:
        def job() -> None:
            for _ in range(20):
                assert len(find_mlp_blocks(models[depth], X)) == depth

        return job

    state = torch.get_rng_state()
    together(*(finds(depth) for depth in (1, 2, 3, 3)))
    assert torch.equal(torch.get_rng_state(), state)
    for model in models.values():
        for module in model.modules():
            assert module.training
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


class Meeting(nn.Module):
    """Waits in its forward for a pass of the other thread, once each."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.meet = inner, lambda: None

    def forward(self, x: Tensor) -> Tensor:
        self.meet()
        y = self.inner(x)
        self.meet()
        return y


def test_a_finder_sees_no_pass_of_another_thread_and_changes_none() -> None:
    model = Meeting(model_of(3)).eval()
    want = model(X)
    finding, ran = threading.Event(), threading.Event()
    got: list[Tensor] = []

    def meet() -> None:
        if threading.current_thread().name == "finder":
            ran.clear()
            finding.set()
            assert ran.wait(60)

    model.meet = meet

    def finder() -> None:
        threading.current_thread().name = "finder"
        blocks = find_mlp_blocks(model, X)
        assert [block.up.name for block in blocks] == ["inner.0.0", "inner.1.0", "inner.2.0"]
        assert [block.calls for block in blocks] == [1, 1, 1]

    def runner() -> None:
        for _ in range(2):  # one before the finder's own layers run, one behind them
            assert finding.wait(60)
            finding.clear()
            got.append(model(X))
            ran.set()

    together(finder, runner)
    assert len(got) == 2
    # to rounding, since a thread may multiply by a number of threads of its own
    assert all(torch.allclose(y, want, rtol=1e-5, atol=1e-6) for y in got)
