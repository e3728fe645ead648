"""torch's own nn.TransformerEncoderLayer, with padding: nothing else is needed.

python examples/torch_encoder.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from actsparse import accelerate, decay_groups, observe, sparsify

WIDTH, HEADS, HIDDEN, LENGTH = 32, 4, 128, 12


def main(steps: int = 150) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=True
    )
    model = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
    x = torch.randn(64, LENGTH, WIDTH)
    padding = torch.arange(LENGTH)[None] >= torch.randint(4, LENGTH + 1, (64, 1))  # True: padding
    inputs = {"src": x, "src_key_padding_mask": padding}

    handle = sparsify(model, "best", inputs=inputs)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1, exclude=("norm", "bias")), lr=1e-3)
    handle.attach(optimizer, steps=steps)
    for _ in range(steps):  # to say what came one token before
        loss = F.mse_loss(model(**inputs)[:, 1:], x[:, :-1]) + handle.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.eval()
    with torch.no_grad(), observe(model) as seen:
        dense = model(**inputs)
    print(f"loss {loss:.3f}")
    print(seen)  # padding is left out by the model's own mask
    with torch.no_grad(), accelerate(model, mode="sparse"):
        error = float((model(**inputs) - dense).abs().max())
    print(f"the same by sparse products: largest difference {error:.1e}")


if __name__ == "__main__":
    main()
