"""Models of the zoo, built once and copied for each test, and what they compute."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from actsparse.blocks import Blocks, find_mlp_blocks
from tests.zoo import BY_ID, call


@functools.cache
def _built(name: str) -> tuple[nn.Module, Any]:
    return BY_ID[name].build()


def built(name: str = "gpt2") -> tuple[nn.Module, Any]:
    """A model of the zoo as it is built, and what it runs on."""
    return copy.deepcopy(_built(name))


@functools.cache
def _found(name: str) -> tuple[nn.Module, Any, Blocks]:
    model, inputs = built(name)
    model.eval()
    return model, inputs, find_mlp_blocks(model, inputs)


def ready(name: str) -> tuple[nn.Module, Any, Blocks]:
    """A model of the zoo in eval mode, what it runs on, and its blocks."""
    return copy.deepcopy(_found(name))


def tensors(output: Any) -> list[Tensor]:
    """Every floating-point tensor of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = output.values()
    if isinstance(output, str | bytes) or not hasattr(output, "__iter__"):
        return []
    return [tensor for item in output for tensor in tensors(item)]


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """What a pass computes, without gradients."""
    return tensors(call(model, inputs))


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """The same bits."""
    assert first
    assert len(first) == len(second)
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def assert_same(model: nn.Module, twin: nn.Module, inputs: Any) -> None:
    """Both have the same weights and dtypes, train the same of them, and compute the same bits."""
    first, second = model.state_dict(), twin.state_dict()
    assert list(first) == list(second)
    for key, value in first.items():
        assert value.dtype == second[key].dtype, key
        assert torch.equal(value, second[key]), key
    assert same(outputs(model, inputs), outputs(twin, inputs))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == [name for name, p in twin.named_parameters() if p.requires_grad]


def fill(model: nn.Module, size: float = 0.5, seed: int = 1) -> list[nn.Parameter]:
    """Give every zeroth bias table random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    tables = [p for name, p in model.named_parameters() if name.endswith("zeroth_bias")]
    with torch.no_grad():
        for table in tables:
            table.copy_(size * torch.randn(table.shape, generator=generator))
    return tables


def footprint(model: nn.Module) -> dict[str, Any]:
    """All that an attached change could leave behind, parameters' values apart."""
    left: dict[str, Any] = {}
    for name, module in model.named_modules():
        attributes = vars(module)
        left[name] = (
            sorted(attributes),
            {key: len(value) for key, value in attributes.items() if key.endswith("_hooks")},
            sorted(module._modules),
            attributes.get("forward"),
            attributes.get("use_nested_tensor"),
            module.training,
        )
    parameters = model.named_parameters()
    left["parameters"] = {name: (p.requires_grad, p.grad is None) for name, p in parameters}
    return left
