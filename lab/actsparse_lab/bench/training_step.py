"""What the paper recipe and observation cost in a training step of a ViT-S."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from actsparse import observe
from actsparse.bench.models_at_density import need_transformers
from actsparse.bench.timing import interleaved, ratio
from actsparse.modify import sparsify

# ViT-S/16 at 224: 12 blocks, D = 384, H = 1536, T = 197
VIT_S = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "relu",
    "num_labels": 1000,
}
PAIRS = [
    ("paper", "vanilla"),
    ("compiled paper", "compiled vanilla"),
    ("observed vanilla", "vanilla"),
    ("observed paper", "paper"),
    ("removed", "vanilla"),
]


def vit_s(**config: Any) -> Any:
    """A ViT-S to train, with random weights; ``config`` changes its sizes.

    Raises:
        ImportError: transformers is missing (``pip install "actsparse[train]"``).
    """
    need_transformers()
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**VIT_S | config)).train()


def vit_batch(size: int) -> dict[str, torch.Tensor]:
    """Random images [size, 3, 224, 224] and labels [size], the same each time."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(size, 3, 224, 224, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, 1000, (size,), generator=generator)}


def bench_training_step(
    rounds: int = 21,
    batch: int = 2,
    compiled: bool = True,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Time forward, backward and AdamW step of a ViT-S: vanilla, paper, observed, compiled.

    Returns:
        ``seconds`` (median of each program), ``ratios`` (rows of
        :class:`actsparse.bench.timing.Ratio`), ``sizes``.

    Raises:
        ImportError: transformers is missing (``pip install "actsparse[train]"``).
    """
    images = vit_batch(batch)
    some = images["pixel_values"][:1]

    def program(recipe: str | None, compile: bool = False, watch: bool = False) -> Any:
        model = vit_s()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
        if recipe == "removed":
            sparsify(model, "paper", inputs=some).remove()
        elif recipe is not None:
            sparsify(model, recipe, inputs=some, optimizer=optimizer)
        if watch:
            observe(model, ["density"], inputs=some)
        run: nn.Module = torch.compile(model) if compile else model  # type: ignore[assignment]

        def step() -> None:
            optimizer.zero_grad()
            run(**images).loss.backward()
            optimizer.step()

        return step

    programs = {
        "vanilla": program(None),
        "paper": program("paper"),
        "observed vanilla": program(None, watch=True),
        "observed paper": program("paper", watch=True),
        "removed": program("removed"),
    }
    if compiled:
        programs["compiled vanilla"] = program(None, compile=True)
        programs["compiled paper"] = program("paper", compile=True)
    times = interleaved(programs, rounds, progress=progress)
    ratios = [ratio(times, of, to) for of, to in PAIRS if of in times]
    return {
        "benchmark": "training_step",
        "sizes": {**VIT_S, "batch": batch, "rounds": rounds},
        "seconds": {name: sorted(values)[len(values) // 2] for name, values in times.items()},
        "ratios": [asdict(row) for row in ratios],
    }
