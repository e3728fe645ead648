"""Trains tiny models with the paper recipe; run as a script, as one of two DDP processes.

``python ddp_worker.py RANK WORLD FOLDER`` writes FOLDER/rank{RANK}.pt; ``train`` with world 1 is
the reference in the test's own process.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from actsparse import ActivationPenalty, sparsify
from actsparse.modify.recipe import recipe_named

STEPS, BATCH, D = 20, 8, 16


@dataclass(frozen=True)
class Variant:
    model: str
    dtype: torch.dtype
    hoyer: bool = False

    def __str__(self) -> str:
        name = f"{self.model}-{str(self.dtype).removeprefix('torch.')}"
        return name + "-hoyer" * self.hoyer


VARIANTS = [
    Variant("vit", torch.float64),
    Variant("vit", torch.float32),
    Variant("vit", torch.float64, hoyer=True),
    Variant("t5", torch.float64),
    Variant("t5", torch.float32),
    Variant("t5", torch.float64, hoyer=True),
    Variant("t5", torch.float32, hoyer=True),
]


@dataclass
class Run:
    losses: list[float]
    weights: dict[str, Tensor]


def vit() -> nn.Module:
    config = hf.ViTConfig(
        image_size=16, patch_size=8, num_labels=5, hidden_act="relu", hidden_size=D,
        intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=37, d_model=D, d_kv=8, d_ff=40, num_layers=2, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="relu", decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def in_float64(model: nn.Module) -> nn.Module:
    """T5LayerNorm squares in float32 whatever it is given: its rounding would decide the test."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "T5LayerNorm":
                setattr(module, name, nn.RMSNorm(D, eps=1e-6))
    return model.double()


def batch(variant: Variant, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    if variant.model == "vit":
        pixels = torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64)
        labels = torch.randint(5, (BATCH,), generator=generator)
        return {"pixel_values": pixels.to(variant.dtype), "labels": labels}
    ids = torch.randint(1, 37, (BATCH, 12), generator=generator)
    labels = torch.randint(1, 37, (BATCH, 7), generator=generator)
    # as many unpadded tokens in either half, since each process takes the mean over its own
    lengths = torch.tensor([12, 9, 5, 12] * 2)[:, None]
    mask = (torch.arange(12) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def train(variant: Variant, rank: int = 0, world: int = 1, half_only: bool = False) -> Run:
    """``half_only``: the mistake a test must notice, one half of the data and no averaging."""
    torch.manual_seed(0)
    model = {"vit": vit, "t5": t5}[variant.model]()
    if variant.dtype == torch.float64:
        model = in_float64(model)
    recipe = list(recipe_named("paper").modifications)
    if variant.hoyer:
        recipe.append(ActivationPenalty("hoyer", weight=0.5, ramp=0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)
    handle = sparsify(model, recipe, inputs=batch(variant, 0))
    handle.attach(optimizer, steps=STEPS)
    model.train()
    ddp: Any = model if world == 1 else nn.parallel.DistributedDataParallel(model)
    share = BATCH // (2 if half_only else world)
    losses = []
    for step in range(STEPS):
        rows = slice(rank * share, (rank + 1) * share)
        inputs = {name: value[rows] for name, value in batch(variant, step).items()}
        optimizer.zero_grad()
        loss = ddp(**inputs).loss + handle.penalty()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert handle.step == STEPS
    return Run(losses, {name: value.clone() for name, value in model.state_dict().items()})


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # a file instead of a port: nothing to collide with
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    runs = {}
    for variant in VARIANTS:
        run = train(variant, rank, world)
        runs[str(variant)] = {"losses": run.losses, "weights": run.weights}
    torch.save(runs, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads outlive the group and may abort an interpreter that ends first


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
