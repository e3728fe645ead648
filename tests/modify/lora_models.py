"""Models with adapters of peft, fresh or three steps into a recipe, and what to compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from actsparse import Handle, handle_of, sparsify
from actsparse.modify.adapters import lora_config
from tests.zoo.ready import built as build
from tests.zoo.ready import outputs, same

MODELS = ["vit-classifier", "t5-relu", "t5-gated-gelu", "llama", "gpt2"]
ATTENTION = dict(zip(MODELS, ["q_proj", "q", "q", "v_proj", "c_attn"], strict=True))


def built(name: str) -> tuple[nn.Module, Any]:
    model, inputs = build(name)
    return model.eval(), inputs


def wrapped(name: str, fresh: bool = False, **options: Any) -> tuple[Any, Any]:
    """A model with adapters that do something, unless ``fresh``."""
    import peft

    model, inputs = built(name)
    config = lora_config(model, inputs, r=4, **options)
    config.init_lora_weights = fresh
    return peft.get_peft_model(model, config), inputs


def half_trained(
    name: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, Any, Handle]:
    """Adapters, zeroth biases and norms three steps into a schedule of ten, in eval mode."""
    model, inputs = wrapped(name, **options)
    model.to(dtype)
    return model, inputs, three_steps(model, sparsify(model, "paper-finetune", inputs=inputs))


def three_steps(model: nn.Module, handle: Handle) -> Handle:
    """Three steps on random gradients, the same each time."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    handle.attach(optimizer, steps=10)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        for parameter in trained:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = noise.to(parameter.dtype)
        optimizer.step()
    optimizer.zero_grad()
    model.eval()
    return handle


def assert_same(model: nn.Module, twin: nn.Module, inputs: Any) -> None:
    assert same(outputs(model, inputs), outputs(twin, inputs))
    assert trainable(model) == trainable(twin)
    first, second = handle_of(model), handle_of(twin)
    assert first.recipe == second.recipe
    assert first.state_dict() == second.state_dict()
    assert str(first) == str(second)


def trainable(model: nn.Module) -> list[str]:
    """The names of what an optimizer would move."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def tables(model: nn.Module) -> dict[str, Tensor]:
    """The zeroth biases in force, by the names of their layers."""
    return {b.up.name: b.up.module.actsparse.zeroth_bias for b in handle_of(model).blocks}
