"""Whole models on a GPU, dense beside accelerated: tokens or images a second, joules and bytes.

Weights are random (:mod:`actsparse.bench.models_at_density`). A Llama-like decoder of about 10⁹
parameters with a ReLU, whose MLPs have biases for that, decodes at batch 1, a token a CUDA graph; a
ViT-B takes batches of images, forward and in training steps.
"""

from __future__ import annotations

import copy
import ctypes
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from actsparse import MLPBlock, find_mlp_blocks
from actsparse.bench.model import _step
from actsparse.bench.models_at_density import arrange, arranged, need_transformers, thresholds
from actsparse.kernels import accelerate
from actsparse.kernels.accelerated import Mode
from actsparse_lab.bench.gpu_mlp import Place, Program, Row

MODELS = (("llama", 0.05), ("vit-b", 0.01), ("vit-b", 0.05), ("llama", 0.01))
LLAMA: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "hidden_act": "relu",
    "mlp_bias": True,
}
PROMPT, WRITTEN = 448, 64  # tokens
IMAGES = 64  # in a batch
DRAWN = 2.0  # seconds over which energy is counted; the counter moves every tenth or so


def measure(place: Place, name: str, density: float, **sizes: int) -> Row:
    """One of :data:`MODELS`; ``sizes`` replace settings of its config.

    Of each kind of call (``decoding``, or ``forward`` and ``training``): ``seconds``, ``ratios``,
    ``per_second`` of the ``items`` in a call, ``joules`` an item (None where NVML does not tell)
    and peak ``memory``, bytes beside what was there; in decoding the model's own too.

    Raises:
        ImportError: transformers is missing (``pip install "actsparse[train]"``).
    """
    need_transformers()
    torch.manual_seed(0)
    row: Row = {"model": name, "wanted": density}
    with place.device:  # what is made is made there
        return row | (_llama if name == "llama" else _vit)(place, density, **sizes)


def _vit(place: Place, density: float, batch: int = IMAGES, **sizes: int) -> Row:
    subject = arranged("vit-b", density, "float32", batch=batch, **sizes)
    model = subject.model.to(place.dtype)
    subject.inputs["pixel_values"] = subject.inputs["pixel_values"].to(place.dtype)
    arrange(subject.blocks(model), density, lambda: subject.run(model))  # rounding has moved them
    fast = copy.deepcopy(model)
    handle = accelerate(fast, inputs=subject.inputs)
    models = {"dense": model, "auto": fast}

    def forward(each: nn.Module) -> None:
        with torch.no_grad():
            subject.run(each)

    def steps(each: nn.Module) -> Program:
        return _step(each, lambda: subject.run(each)[1], [])

    row: Row = {"density": subject.densities()["density"]}
    row["forward"] = _compare(
        place, {name: partial(forward, each) for name, each in models.items()}, batch
    )
    row["training"] = _compare(place, {name: steps(each) for name, each in models.items()}, batch)
    return {**row, "auto_ran": handle.lines()}


def _llama(
    place: Place, density: float, prompt: int = PROMPT, written: int = WRITTEN, **sizes: int
) -> Row:
    """Decode known text: what was arranged on it then holds for every token."""
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **sizes})).to(place.dtype).eval()
    text = torch.randint(0, model.config.vocab_size, (1, prompt + written))
    some = {"input_ids": text[:, :4]}
    blocks = find_mlp_blocks(model, some)
    found = _arrange_gated(blocks, density, lambda: model(input_ids=text, use_cache=False))
    cache = StaticCache(config=model.config, max_cache_len=prompt + written)
    # transformers 5.24 calls it cache, and warns of the name before
    names = inspect.signature(model.forward).parameters
    held = {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}
    token = text[:, :1].clone()
    following = text[0].clone()

    def step(own: nn.Module) -> Tensor:
        at = cache.layers[0].cumulative_length  # on the device: a CUDA graph moves on with it
        token.copy_(following.index_select(0, at.view(1)).view(1, 1))
        with torch.no_grad():
            return own(input_ids=token, **held).logits

    def back() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt)

    with torch.no_grad():
        model(input_ids=text[:, :prompt], **held)

    def text_by(one: Program) -> Program:
        def write() -> None:
            back()
            for _ in range(written):
                one()

        return write

    ways: dict[str, Mode | None] = {"dense": None, "sparse": "sparse", "screened": "screened"}
    programs: dict[str, Program] = {}
    memory: dict[str, int | None] = {}
    for name, mode in ways.items():
        before = torch.cuda.memory_allocated() if place.gpu else 0
        own = copy.deepcopy(model)
        if mode is not None:
            accelerate(own, inputs=some, mode=mode)
        if place.gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):  # the first counts, and takes another way than those after it
            back()
            step(own)
        back()
        programs[name] = text_by(place.captured(partial(step, own)))
        memory[name] = torch.cuda.max_memory_allocated() - before if place.gpu else None
    row = _compare(place, programs, written)
    shares = {name: float(each[:, prompt:].double().mean()) for name, each in found.items()}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "density": sum(shares.values()) / len(shares),
        "decoding": {**row, "memory": memory},
    }


def _arrange_gated(
    blocks: list[MLPBlock], density: float, run: Callable[[], object]
) -> dict[str, Tensor]:
    """Set the biases of the gates, in the order in which they run; which units are active then."""
    found: dict[str, Tensor] = {}

    def hook(block: MLPBlock, module: nn.Module, args: Any, z: Tensor) -> Tensor:
        bias = block.pre_activation.bias
        assert bias is not None
        bias -= thresholds(z.flatten(0, -2).float(), density).to(bias.dtype)
        z = module.forward(*args)
        found[block.name] = z > 0
        return z

    hooks = [
        block.pre_activation.module.register_forward_hook(partial(hook, block)) for block in blocks
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for each in hooks:
            each.remove()
    return found


def _compare(place: Place, programs: Mapping[str, Program], items: int) -> Row:
    for program in programs.values():
        for _ in range(3):  # accelerate counts, tries and chooses
            program()
    timed = place.timed(programs)
    return {
        **timed,
        "items": items,
        "per_second": {name: items / each for name, each in timed["seconds"].items()},
        "joules": {
            name: _joules(place, program, timed["seconds"][name], items)
            for name, program in programs.items()
        },
        "memory": {name: place.peak(program) for name, program in programs.items()},
    }


def _joules(place: Place, program: Program, seconds: float, items: int) -> float | None:
    """Energy of the whole GPU for an item, over :data:`DRAWN` seconds of nothing else."""
    if not place.gpu:
        return None
    calls = max(1, round(DRAWN / seconds))
    torch.cuda.synchronize()
    before = energy(str(torch.cuda.get_device_properties(place.device).uuid))
    for _ in range(calls):
        program()
    torch.cuda.synchronize()
    after = energy(str(torch.cuda.get_device_properties(place.device).uuid))
    return None if before is None or after is None else (after - before) / (calls * items)


def energy(uuid: str) -> float | None:
    """Joules that a GPU has drawn since its driver was loaded, as NVML counts them, or None."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    if (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(device))
        or nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules))
    ):
        return None
    return millijoules.value / 1e3
