"""Hugging Face's Accelerate: several processes, gradient accumulation, mixed precision.

accelerate launch examples/accelerate_loop.py, or python examples/accelerate_loop.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from actsparse import decay_groups, observe, sparsify


class Net(nn.Module):
    """A residual MLP; a Transformer's blocks are found in the same way."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.down(F.relu(self.up(self.norm(x)))))


def main(steps: int = 200, accumulate: int = 2) -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 32)
    loader = DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=32, shuffle=True)
    accelerator = Accelerator(gradient_accumulation_steps=accumulate)
    model = Net()
    handle = sparsify(model, "best", inputs=x[:2])  # before prepare, which may wrap the model
    groups = decay_groups(model, 0.1, exclude=("norm", "bias"))
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    handle.attach(optimizer, steps=steps)  # optimizer steps: accumulated batches count once
    with observe(model) as seen:
        while handle.step < steps:
            for inputs, labels in loader:
                with accelerator.accumulate(model):
                    loss = F.cross_entropy(model(inputs), labels) + handle.penalty()
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                if handle.step >= steps:
                    break
                if accelerator.sync_gradients and handle.step % max(1, steps // 4) == 0:
                    density = seen.summary("train")["density"]
                    accelerator.print(f"step {handle.step}: density {density:.3f}")
                    seen.reset("train")
        model.eval()
        with torch.inference_mode():
            right = (model(x[:512]).argmax(1) == x[:512, :4].argmax(1)).float().mean()
    accelerator.print(f"accuracy {right:.2f}")
    if accelerator.is_main_process:
        print(seen)


if __name__ == "__main__":
    main()
