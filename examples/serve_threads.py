"""Serve a sparse model from several threads: exact, and each block by its fastest program.

python examples/serve_threads.py
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from actsparse import accelerate


class Layer(nn.Module):
    """A Transformer's MLP whose biases leave about 3 % of the neurons active."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width),
        )  # fmt: skip
        nn.init.normal_(self.up.weight, std=width**-0.5)
        nn.init.constant_(self.up.bias, -1.9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def main(width: int = 512, requests: int = 64, threads: int = 4) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # of each request; there are several at a time
    model = nn.Sequential(*(Layer(width, 4 * width) for _ in range(4))).eval()
    inputs = [torch.randn(1, 16, width) for _ in range(requests)]

    @torch.inference_mode()
    def answer(x: torch.Tensor) -> torch.Tensor:
        return model(x)

    def serve() -> tuple[list[torch.Tensor], float]:
        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(answer, inputs)), time.perf_counter() - began

    dense, seconds = serve()
    handle = accelerate(model, inputs=inputs[0])
    for x in inputs[:4]:  # the second call of a kind times the programs
        answer(x)
    fast, less = serve()
    error = max(float((a - b).abs().max()) for a, b in zip(dense, fast, strict=True))
    print(f"{requests} requests by {threads} threads: {seconds:.3f} s dense, {less:.3f} s now")
    print(f"largest difference of any output: {error:.1e}")
    print(handle)


if __name__ == "__main__":
    main()
