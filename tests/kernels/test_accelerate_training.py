"""``accelerate`` in training loops: processes, accumulation, optimizers, amid other grad modes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from actsparse.kernels import accelerate
from tests.processes import in_two_processes

D, H, B, T = 16, 96, 6, 5
EPS = torch.finfo(torch.float32).eps
# of sums of at most B·T·H products, through two blocks and a few steps
CLOSE = {"rtol": 0, "atol": B * T * H * EPS}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)) for _ in range(2)
        )
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def batch(seed: int = 0) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def loss(y: Tensor) -> Tensor:
    return y.log_softmax(-1)[..., 0].square().mean()


def _process(folder: str) -> None:
    rank = torch.distributed.get_rank()
    model = net()
    handle = accelerate(model, inputs=batch(), mode="screened")
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        loss(ddp(batch(step).chunk(2)[rank])).backward()
        optimizer.step()
    assert sum(row["calls"]["screened"] for row in handle.table()) == 2 * 3
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")


def test_two_processes_train_as_one_dense_process_does(tmp_path: Path) -> None:
    in_two_processes(_process, str(tmp_path))
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        loss(model(batch(step))).backward()
        optimizer.step()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, want in model.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], want, **CLOSE)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "LBFGS"])
def test_optimizers_get_the_gradients_of_accumulated_batches(name: str) -> None:
    """Those of float64: LBFGS divides by differences of gradients, and dense float32 errs more."""
    grads, values = [], []
    for dtype in (torch.float64, torch.float32):
        model = net().to(dtype)
        if dtype is torch.float32:
            accelerate(model, inputs=batch(), mode="sparse")
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3)

        def closure(
            model: nn.Module = model,
            optimizer: torch.optim.Optimizer = optimizer,
            dtype: torch.dtype = dtype,
        ) -> float:
            optimizer.zero_grad()
            total = 0.0
            for step in range(3):
                one = loss(model(batch(step).to(dtype))) / 3
                one.backward()
                total += float(one.detach())
            return total

        values.append(optimizer.step(closure))
        closure()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert values[1] == pytest.approx(values[0], rel=B * T * H * EPS)
    scale = max(float(g.abs().max()) for g in grads[0])
    for one, two in zip(*grads, strict=True):
        assert float((one - two).abs().max()) <= B * T * H * EPS * max(scale, 1)


def test_a_trained_models_copy_goes_its_own_way() -> None:
    model = net()
    handle = accelerate(model, inputs=batch(), mode="sparse")
    loss(model(batch())).backward()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.layers[0][0].weight.zero_()
    want = Net.forward(copy.deepcopy(model), batch())
    torch.testing.assert_close(model(batch()), want, **CLOSE)
    assert not torch.equal(twin(batch()), want)
    handle.remove()
    torch.testing.assert_close(model(batch()), want, **CLOSE)
