"""A plain training loop, as in nanoGPT: where the lines of actsparse go.

python examples/plain_loop.py
"""

from __future__ import annotations

from pydoc_data.topics import topics  # the pages of Python's help, as text to learn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsparse import decay_groups, observe, sparsify

LENGTH, WIDTH, HIDDEN, HEADS, BATCH = 32, 64, 256, 4, 16
TEXT = torch.frombuffer(bytearray("".join(topics.values()).encode()), dtype=torch.uint8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.act, self.down = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.ln_1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.ln, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(self.ln(self.blocks(x)))


def batch() -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(TEXT) - LENGTH - 1, (BATCH, 1))
    rows = TEXT[starts + torch.arange(LENGTH + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def main(steps: int = 300) -> None:
    torch.manual_seed(0)
    model = GPT()
    handle = sparsify(model, "best", inputs=batch()[0])  # 1: modify
    groups = decay_groups(model, 0.1, exclude=("norm", "bias"))  # 2: what does not decay
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    handle.attach(optimizer, steps=steps)  # 3: schedules follow the steps
    with observe(model) as seen:
        for step in range(1, steps + 1):
            ids, targets = batch()
            loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
            (loss + handle.penalty()).backward()  # 4: the penalty
            optimizer.step()
            optimizer.zero_grad()
            if step % max(1, steps // 5) == 0:
                density = seen.summary("train")["density"]
                print(f"step {step}: loss {loss:.2f}, {density:.1%} of the neurons are active")
                seen.reset("train")  # the next line is of the next steps alone
    print(handle)


if __name__ == "__main__":
    main()
