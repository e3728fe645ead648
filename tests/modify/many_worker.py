"""Trains tiny models in one process or in several: DDP or FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn

from actsparse import ActivationPenalty, sparsify
from actsparse.blocks.sharding import whole
from actsparse.modify import Handle, decay_groups
from actsparse.modify.recipe import recipe_named
from actsparse.observe import observe

STEPS, BATCH, D = 20, 8, 16


@dataclass(frozen=True)
class Variant:
    """What is trained; the recipe is one by name, with the Hoyer penalty where it says so."""

    model: Literal["vit", "t5"]
    recipe: str = "paper"
    hoyer: bool = False
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        name = f"{self.model}-{self.recipe}{'-hoyer' * self.hoyer}"
        return name + f"-{str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Job:
    """A variant, who trains it, and the mistake made on purpose.

    ``"half"``: one process on half of the data; ``"unprojected"``: one of two processes takes back
    what the projections did to its parameters.
    """

    variant: Variant
    engine: Literal["one", "ddp", "fsdp"] = "one"
    mistake: Literal["half", "unprojected"] | None = None

    def __str__(self) -> str:
        return f"{self.engine}-{self.variant}{'-' + self.mistake if self.mistake else ''}"


@dataclass
class Run:
    """The loss of each step, the weights (gathered), and the state of what was seen: the
    process's own, and that of all."""

    losses: list[float]
    weights: dict[str, Tensor]
    own: dict[str, Tensor]
    seen: dict[str, Tensor]


VARIANTS = [
    Variant(model, recipe, hoyer, dtype)
    for model in ("vit", "t5")
    for recipe, hoyer in (("paper", False), ("paper", True), ("paper-finetune", True))
    for dtype in (torch.float64, torch.float32)
]
JOBS = [
    Job(variant, engine, mistake)
    for variant in VARIANTS
    for engine in ("ddp", "fsdp")
    for mistake in (None, "unprojected")
    if mistake is None or variant.dtype == torch.float64
]


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


def build(variant: Variant) -> nn.Module:
    """The plain model, the same each time."""
    torch.manual_seed(0)
    model = {"vit": vit, "t5": t5}[variant.model]()
    if variant.dtype == torch.float64:
        # T5LayerNorm squares in float32 whatever it is given: its rounding would decide the test
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child).__name__ == "T5LayerNorm":
                    setattr(module, name, nn.RMSNorm(D, eps=1e-6))
        model = model.double()
    if variant.recipe == "paper-finetune":  # a trained model: scales of either sign, biases
        for name, parameter in model.named_parameters():
            if "norm" in name:
                low, high = (-1.8, 1.8) if name.endswith("weight") else (-0.1, 0.1)
                nn.init.uniform_(parameter, low, high)
    return model


def layers(model: Any) -> list[nn.Module]:
    """The transformer layers, which FSDP2 is to shard one by one."""
    if isinstance(model, hf.ViTForImageClassification):
        return list(model.vit.layers)
    return [*model.encoder.block, *model.decoder.block]


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


def shard(model: nn.Module, parts: list[nn.Module]) -> None:
    """FSDP2: each of ``parts`` by itself, and the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in parts:
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train(job: Job) -> Run:
    """20 steps, watched, then an evaluation, watched too."""
    variant = job.variant
    rank, world = (0, 1) if job.engine == "one" else (dist.get_rank(), dist.get_world_size())
    share = BATCH // (2 if job.mistake == "half" else world)
    rows = slice(rank * share, (rank + 1) * share)

    def part(step: int) -> dict[str, Tensor]:
        return {name: value[rows] for name, value in batch(variant, step).items()}

    model = build(variant)
    recipe = list(recipe_named(variant.recipe).modifications)
    if variant.hoyer:
        recipe.append(ActivationPenalty("hoyer", weight=0.5, ramp=0.5))
    handle = sparsify(model, recipe, inputs=batch(variant, 0))
    engine: Any = model
    if job.engine == "fsdp":
        shard(model, layers(model))
    elif job.engine == "ddp":
        engine = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.3), lr=0.01)
    before, after = _undoing(model) if job.mistake == "unprojected" and rank else (None, None)
    if before:
        optimizer.register_step_post_hook(before)
    handle.attach(optimizer, steps=STEPS)
    if after:
        optimizer.register_step_post_hook(after)

    losses = []
    # the loss is a mean over the process's own samples, which is what its gradients are read of
    with observe(model, ["density", "flatness", "gradient"], loss_reduction="mean") as seen:
        engine.train()
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = engine(**part(step)).loss + handle.penalty()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if job.engine == "fsdp":
                kinds = {type(parameter).__name__ for parameter in model.parameters()}
                assert kinds == {"DTensor"}, kinds
        engine.eval()
        with torch.no_grad():
            engine(**part(STEPS))
    own = seen.state_dict()
    if world > 1:
        seen.pool()
    weights = {name: whole(value.detach()).clone() for name, value in model.state_dict().items()}
    if job.mistake is None:
        _check_projected(handle, weights, uplift=variant.recipe == "paper-finetune")
    return Run(losses, weights, own, seen.state_dict())


def _undoing(model: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks that note this process's parameters, and put them back."""
    noted: list[Tensor] = []

    def local() -> list[Tensor]:
        return [getattr(p.detach(), "_local_tensor", p.detach()) for p in model.parameters()]

    def note(*_: Any) -> None:
        noted[:] = [tensor.clone() for tensor in local()]

    def put_back(*_: Any) -> None:
        for tensor, value in zip(local(), noted, strict=True):
            tensor.copy_(value)

    return note, put_back


def _check_projected(handle: Handle, weights: dict[str, Tensor], uplift: bool) -> None:
    """The run means something only where the projections had something to do."""
    assert handle.step == STEPS
    at_floor, at_bound = set(), False
    for block in handle.blocks:
        assert block.norm is not None
        scale = weights[f"{block.norm.name}.weight"]
        table, bound = weights[f"{block.up.name}.actsparse.zeroth_bias"].abs(), 0.1 * scale.abs()
        assert bool((scale.abs() >= 1).all() and (table <= bound).all())
        at_floor |= set(scale[scale.abs() == 1].tolist())
        at_bound |= bool((table == bound).any())
    assert at_bound, "no zeroth bias is at its bound"
    # in finetuning scales of either sign are raised
    assert at_floor == ({1.0, -1.0} if uplift else {1.0}), f"scales at the floor: {at_floor}"


def train_each(folder: Path, jobs: list[Job]) -> None:
    """In each of several processes; writes ``folder/RANK.pt``."""
    runs = {str(job): vars(train(job)) for job in jobs}
    torch.save(runs, folder / f"{dist.get_rank()}.pt")
