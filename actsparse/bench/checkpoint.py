"""Time a converted checkpoint beside the dense one it was made of: decoding and prefill."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from actsparse import find_mlp_blocks
from actsparse.bench.model import CUT, Programs, amdahl, cut_out, timed
from actsparse.bench.models_at_density import static_cache
from actsparse.bench.timing import interleaved
from actsparse.blocks.block import Blocks
from actsparse.kernels import accelerate, build
from actsparse.modify.drop_small import dropping_blocks

WORK = ("decode", "generate", "prefill")


def bench_checkpoint(
    dense: Any,
    sparse: Any,
    prompt: Tensor,
    tokens: int = 32,
    prefill: int = 512,
    rounds: int = 7,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Time decoding and prefill of a model with thresholds beside the dense model, in turn.

    Dense is the faster of the dense model's own layers and ``accelerate(mode="dense")``. The limit
    is the dense model with MLPs that hand on their input. All at batch 1, on torch's threads.

    Args:
        dense: the dense causal language model of transformers, in evaluation mode.
        sparse: the converted one, in the same dtype; it is accelerated and released again.
        prompt: token ids [1, T] to decode after.
        tokens: how many to decode.
        prefill: tokens of the text that prefill reads; the prompt is repeated for it.
        rounds: how often each program is timed.
        progress: called with what is being done.

    Returns:
        For ``decode`` (a bare greedy loop with a static cache), ``generate`` and ``prefill``:
        ``seconds`` of each program, ``best_dense``, ``ratios`` of the best dense to the accelerated
        model and to the model without MLPs, and for the first two ``tokens_a_second``; ``expected``
        of the decode loop, what the blocks' own gain lets expect by Amdahl; ``same_tokens``:
        whether the accelerated model decodes what the same model decodes by its layers.
    """
    models = {"layers": dense, "dense programs": copy.deepcopy(dense), CUT: copy.deepcopy(dense)}
    blocks = {name: find_mlp_blocks(models[name], prompt) for name in ("layers", "dense programs")}
    accelerate(models["dense programs"], blocks=blocks["dense programs"], mode="dense")
    cut_out(models[CUT], prompt)
    by_layers = _decode(sparse, prompt, tokens)
    handle = accelerate(sparse, inputs=prompt)
    models["accelerated"] = sparse
    long = prompt.repeat(1, -(-prefill // prompt.shape[1]))[:, :prefill]
    result: dict[str, Any] = {"benchmark": "checkpoint", "blocks": len(blocks["layers"])}
    for work, run in zip(
        WORK,
        (
            lambda model: _decode(model, prompt, tokens),
            lambda model: _generate(model, prompt, tokens),
            lambda model: _prefill(model, long),
        ),
        strict=True,
    ):
        programs: Programs = {name: partial(run, each) for name, each in models.items()}
        result[work] = timed(programs, rounds, work, progress)
        if work != "prefill":
            seconds = result[work]["seconds"]
            result[work]["tokens_a_second"] = {name: tokens / s for name, s in seconds.items()}
    result["same_tokens"] = bool(torch.equal(_decode(sparse, prompt, tokens), by_layers))
    result["ran"] = handle.lines()
    best = blocks[result["decode"]["best_dense"]]
    result["decode"]["expected"] = _expected(result["decode"], best, dropping_blocks(sparse))
    handle.remove()
    return result | {
        "tokens": tokens, "prompt": prompt.shape[1], "prefill_tokens": prefill, "rounds": rounds,
        "dtype": str(next(dense.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(), "kernels": build.level(),
    }  # fmt: skip


def _expected(found: dict[str, Any], dense: Blocks, sparse: Blocks) -> float:
    """Amdahl's gain of the decode loop, by all blocks one after another at one token."""
    weight = dense[0].up.weight
    x = torch.randn(1, 1, dense[0].d_model, dtype=weight.dtype, device=weight.device)

    def in_turn(blocks: Blocks) -> Callable[[], object]:  # so that no cache holds the next one
        modules = [block.path[block.around - 1] for block in blocks]
        return lambda: [module(x) for module in modules]

    with torch.inference_mode():
        times = interleaved({"dense": in_turn(dense), "sparse": in_turn(sparse)}, 21)
    gain = statistics.median(times["dense"]) / statistics.median(times["sparse"])
    share = 1 - found["seconds"][CUT] / found["seconds"]["dense"]
    return amdahl(share, gain)


@torch.inference_mode()
def _decode(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    """Greedy tokens [1, tokens] by a bare loop with a static cache."""
    held = static_cache(model, prompt.shape[1] + tokens)
    ids, found = prompt, []
    for _ in range(tokens):
        logits = model(ids, logits_to_keep=1, **held).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        found.append(ids)
    return torch.cat(found, 1)


def _generate(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    made: Tensor = model.generate(
        prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return made


@torch.inference_mode()
def _prefill(model: Any, ids: Tensor) -> None:
    model(ids, logits_to_keep=1)
