"""A ViT of timm, or one with the same modules where timm is not installed.

python examples/timm_vit.py
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsparse import decay_groups, observe, sparsify

WIDTH, PATCH, SIZE = 64, 4, 16


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = nn.MultiheadAttention(WIDTH, 4, batch_first=True), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIZE // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.norm(self.blocks(x)).mean(1))


def build() -> nn.Module:
    if find_spec("timm") is None:
        return ViT()
    from timm.models import VisionTransformer

    return VisionTransformer(SIZE, PATCH, num_classes=2, embed_dim=WIDTH, depth=2, num_heads=4)


def main(steps: int = 100) -> None:
    torch.manual_seed(0)
    model, images = build(), torch.randn(256, 3, SIZE, SIZE)
    labels = (images.mean((1, 2, 3)) > 0).long()  # is it bright?
    handle = sparsify(model, "best", inputs=images[:2])
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1, exclude=("norm", "bias")), lr=1e-3)
    handle.attach(optimizer, steps=steps)
    for step in range(steps):
        rows = slice(32 * (step % 8), 32 * (step % 8) + 32)
        loss = F.cross_entropy(model(images[rows]), labels[rows]) + handle.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with observe(model.eval()) as seen, torch.inference_mode():
        model(images)
    print(f"loss {loss:.2f}\n{seen}")


if __name__ == "__main__":
    main()
