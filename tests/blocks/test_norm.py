"""Norms are recognised by what they compute, their parameters by what changing them does."""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from actsparse.blocks.norm import inspect_norm

N = 12


class AnnotatedNorm(nn.Module):
    """The Annotated Transformer's: a_2 · (x − mean) / (std + eps) + b_2."""

    def __init__(self) -> None:
        super().__init__()
        self.a_2, self.b_2 = nn.Parameter(torch.ones(N)), nn.Parameter(torch.zeros(N))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.a_2 * centred / (x.std(-1, keepdim=True) + 1e-6) + self.b_2


class LuciNorm(nn.Module):
    """x-transformers': F.normalize · √d · gamma, offset or not."""

    def __init__(self, offset: float = 0.0, name: str = "gamma", negative: bool = False) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.full((N,), 1.0 - offset)))
        self.offset, self.name, self.sign = offset, name, -1 if negative else 1

    def forward(self, x: Tensor) -> Tensor:
        scale = getattr(self, self.name) + self.offset
        return self.sign * nn.functional.normalize(x, dim=-1) * N**0.5 * scale


class BiasFirst(nn.Module):
    """Its bias is declared, and added, before the scale; both called something else."""

    def __init__(self) -> None:
        super().__init__()
        self.beta, self.g = nn.Parameter(torch.zeros(N)), nn.Parameter(torch.ones(N))

    def forward(self, x: Tensor) -> Tensor:
        return self.beta + nn.functional.layer_norm(x, (N,)) * self.g


class RmsNorm(nn.Module):
    """No parameter, known by its class's name and by what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:])


NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(N), "weight", "bias", 0.0),
    "LayerNorm without bias": (lambda: nn.LayerNorm(N, bias=False), "weight", None, 0.0),
    "LayerNorm not affine": (lambda: nn.LayerNorm(N, elementwise_affine=False), None, None, 0.0),
    "LayerNorm with a large eps": (lambda: nn.LayerNorm(N, eps=1e-3), "weight", "bias", 0.0),
    "RMSNorm": (lambda: nn.RMSNorm(N), "weight", None, 0.0),
    "RMSNorm not affine": (lambda: nn.RMSNorm(N, elementwise_affine=False), None, None, 0.0),
    "T5": (lambda: T5LayerNorm(N), "weight", None, 0.0),
    "LLaMA": (lambda: LlamaRMSNorm(N), "weight", None, 0.0),
    "Gemma": (lambda: GemmaRMSNorm(N), "weight", None, 1.0),
    "Gemma 2": (lambda: Gemma2RMSNorm(N), "weight", None, 1.0),
    "annotated": (AnnotatedNorm, "a_2", "b_2", 0.0),
    "gamma": (LuciNorm, "gamma", None, 0.0),
    "g, plus one": (lambda: LuciNorm(1.0, "g"), "g", None, 1.0),
    "a sign in front": (lambda: LuciNorm(negative=True), "gamma", None, 0.0),
    "bias first": (BiasFirst, "g", "beta", 0.0),
    "a function's class": (RmsNorm, None, None, 0.0),
}


def trained(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("state", ["fresh", "trained", "zeroed"])
@pytest.mark.parametrize("name", sorted(NORMS))
def test_scale_bias_and_offset_are_found_whatever_their_values(name: str, state: str) -> None:
    build, scale, bias, offset = NORMS[name]
    module = build()
    if state == "trained":
        trained(module)
    if state == "zeroed":
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    norm = inspect_norm("here", module)
    assert norm is not None
    assert (norm.name, norm.scale, norm.bias, norm.offset) == ("here", scale, bias, offset)
    assert norm.module is module
    assert norm.parameter("scale") is (None if scale is None else getattr(module, scale))
    assert norm.parameter("bias") is (None if bias is None else getattr(module, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["LayerNorm", "T5", "Gemma", "annotated", "bias first"])
def test_they_are_found_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    build, scale, bias, offset = NORMS[name]
    norm = inspect_norm("n", trained(build()).to(dtype))
    assert norm is not None
    assert (norm.scale, norm.bias, norm.offset) == (scale, bias, offset)


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((N,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(N))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class Constant(nn.Module):
    """Blind to its input's scale, and to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(N))

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand_as(x)


class BatchNorm(nn.Module):
    """Scale invariant too, but over the batch; no buffer, and a norm by name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return (x - flat.mean(0)) / (flat.std(0, correction=0) + 1e-5) * self.weight


class OwnNorm(nn.Module):
    """Normalises, but through a child: whose part would what be?"""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LayerNorm(N)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class TwoInputs(nn.LayerNorm):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x) + condition


OTHERS = {
    "Linear": lambda: nn.Linear(N, N),
    "Linear without bias": lambda: nn.Linear(N, N, bias=False),
    "Bilinear": lambda: nn.Bilinear(N, N, N),
    "LayerScale": LayerScale,
    "a bias": Shift,
    "a constant": Constant,
    "Dropout": lambda: nn.Dropout(0.5),
    "Dropout in eval": lambda: nn.Dropout(0.5).eval(),
    "Identity": nn.Identity,
    "GELU": nn.GELU,
    "Softmax": lambda: nn.Softmax(-1),
    "PReLU": lambda: nn.PReLU(N),
    "BatchNorm1d": lambda: nn.BatchNorm1d(N),
    "BatchNorm1d without statistics": lambda: nn.BatchNorm1d(N, track_running_stats=False),
    "BatchNorm of one's own": BatchNorm,
    "Embedding": lambda: nn.Embedding(N, N),
    "a norm inside": OwnNorm,
    "a norm of two inputs": lambda: TwoInputs(N),
    "LayerNorm over two axes": lambda: nn.LayerNorm((3, N)),
    "Sequential": lambda: nn.Sequential(nn.LayerNorm(N)),
    "Conv1d": lambda: nn.Conv1d(N, N, 1),
    "HF Conv1D": lambda: hf.pytorch_utils.Conv1D(N, N),
}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_what_is_no_norm_over_the_last_axis_is_not_taken_for_one(name: str) -> None:
    assert inspect_norm("n", OTHERS[name]()) is None


@pytest.mark.parametrize("name", sorted(NORMS))
def test_looking_fires_no_hook_and_changes_nothing(name: str) -> None:
    module = trained(NORMS[name][0]())
    fired: list[str] = []
    module.register_forward_hook(lambda *a: fired.append("forward"))
    module.register_forward_pre_hook(lambda *a: fired.append("pre"))
    before = copy.deepcopy(module.state_dict())
    parameters, attributes = dict(module.named_parameters()), sorted(vars(module))
    random = torch.get_rng_state()
    assert inspect_norm("n", module) is not None
    assert fired == []
    assert sorted(vars(module)) == attributes
    assert torch.equal(torch.get_rng_state(), random)
    for key, parameter in module.named_parameters():
        assert parameter is parameters[key]
        assert torch.equal(parameter, before[key])
        assert parameter.grad is None
        assert parameter.requires_grad


def test_the_parameter_is_looked_up_anew_since_sharding_replaces_it() -> None:
    module = nn.LayerNorm(N)
    norm = inspect_norm("n", module)
    module.weight = nn.Parameter(torch.full((N,), 3.0))
    assert norm.parameter("scale") is module.weight


def patched(module: nn.Module, how: str) -> nn.Module:
    """With a forward on the instance, as kernel libraries and offloading put there."""
    forward = type(module).forward
    if how == "bound":
        module.forward = MethodType(lambda self, x: forward(self, x), module)
    else:
        module.forward = partial(lambda own, x: forward(own, x), module)
    return module


@pytest.mark.parametrize("how", ["bound", "wrapped"])
@pytest.mark.parametrize("name", ["LayerNorm", "LLaMA", "Gemma", "bias first"])
def test_a_forward_on_the_instance_hides_nothing(name: str, how: str) -> None:
    build, scale, bias, offset = NORMS[name]
    norm = inspect_norm("here", patched(build(), how))
    assert norm is not None
    assert (norm.scale, norm.bias, norm.offset) == (scale, bias, offset)


@pytest.mark.parametrize("name", ["LayerNorm", "T5", "Gemma", "annotated"])
def test_parameters_without_values_are_told_apart(name: str) -> None:
    build, scale, bias, offset = NORMS[name]
    norm = inspect_norm("here", build().to("meta"))
    assert norm is not None
    assert (norm.scale, norm.bias, norm.offset) == (scale, bias, offset)
