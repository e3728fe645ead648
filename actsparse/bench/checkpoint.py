"""Time a converted checkpoint beside the dense one: decoding and prefill, or encoding."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from actsparse import find_mlp_blocks
from actsparse.bench.model import (
    COMPILED,
    CUT,
    OURS_COMPILED,
    Programs,
    amdahl,
    cut_out,
    timed,
)
from actsparse.bench.models_at_density import static_cache
from actsparse.bench.timing import interleaved
from actsparse.blocks.block import Blocks
from actsparse.kernels import accelerate, build
from actsparse.modify.drop_small import dropping_blocks

ENCODED = (64, 128)  # texts and tokens of each, of an encoder
Work = dict[str, Callable[[Any], object]]


def bench_checkpoint(
    dense: Any,
    sparse: Any,
    prompt: Tensor,
    tokens: int = 32,
    prefill: int = 512,
    rounds: int = 7,
    compiled: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Time decoding and prefill of a model with thresholds beside the dense model, in turn.

    Of an encoder, the reading of 64 texts of 128 tokens. Dense is the faster of the dense model's
    own layers and ``accelerate(mode="dense")``. The limit is the dense model with MLPs that hand on
    their input. On torch's threads; decoding and prefill at batch 1.

    Args:
        dense: the dense causal language model or encoder of transformers, in evaluation mode.
        sparse: the converted one, in the same dtype; it is accelerated and released again.
        prompt: token ids [1, T] to decode after.
        tokens: how many to decode.
        prefill: tokens of the text that prefill reads; the prompt is repeated for it.
        rounds: how often each program is timed.
        compiled: time the decode loop of both models by ``torch.compile`` too, whose compiling
            takes minutes; the best dense may be that one then.
        progress: called with what is being done.

    Returns:
        For ``decode`` (a bare greedy loop with a static cache), ``generate`` and ``prefill``:
        ``seconds`` of each program, ``best_dense``, ``ratios`` of the best dense to the accelerated
        model and to the model without MLPs, and for the first two ``tokens_a_second``; ``expected``
        of the decode loop, what the blocks' own gain lets expect by Amdahl over what is not
        compiled; ``same_tokens``:
        whether the accelerated model decodes what the same model decodes by its layers. Of an
        encoder, ``encode``, and ``error``: the largest difference of a hidden state to the same
        model's by its layers.
    """
    decodes = dense.get_output_embeddings() is not None
    models = {"layers": dense, "dense programs": copy.deepcopy(dense), CUT: copy.deepcopy(dense)}
    blocks = {name: find_mlp_blocks(models[name], prompt) for name in ("layers", "dense programs")}
    accelerate(models["dense programs"], blocks=blocks["dense programs"], mode="dense")
    cut_out(models[CUT], prompt)
    work: Work
    if decodes:
        long = _repeated(prompt, 1, prefill)
        work = {
            "decode": lambda model: _decode(model, prompt, tokens),
            "generate": lambda model: _generate(model, prompt, tokens),
            "prefill": lambda model: _prefill(model, long),
        }
        sizes = {"tokens": tokens, "prompt": prompt.shape[1], "prefill_tokens": prefill}
    else:
        texts = _repeated(prompt, *ENCODED)
        work = {"encode": lambda model: _encode(model, texts)}
        sizes = {"texts": ENCODED[0], "text_tokens": ENCODED[1]}
    first = next(iter(work))
    by_layers: Any = work[first](sparse)
    handle = accelerate(sparse, inputs=prompt)
    models["accelerated"] = sparse
    result: dict[str, Any] = {"benchmark": "checkpoint", "blocks": len(blocks["layers"])}
    for name, run in work.items():
        programs: Programs = {each: partial(run, model) for each, model in models.items()}
        if compiled and name == "decode":
            for each, model in ((COMPILED, copy.deepcopy(dense)), (OURS_COMPILED, sparse)):
                progress(f"compiling: {each}")
                programs[each] = partial(run, torch.compile(model, dynamic=False))
                programs[each]()
        result[name] = timed(programs, rounds, name, progress)
        if name in ("decode", "generate"):
            seconds = result[name]["seconds"]
            result[name]["tokens_a_second"] = {each: tokens / s for each, s in seconds.items()}
    now: Any = work[first](sparse)
    if decodes:
        result["same_tokens"] = bool(torch.equal(now, by_layers))
    else:
        result["error"] = float((now - by_layers).abs().max())
    result["ran"] = handle.lines()
    shape = (1, 1) if decodes else ENCODED
    seconds = result[first]["seconds"]
    best = min(blocks, key=seconds.__getitem__)  # of those that are not compiled, as the limit
    result[first]["expected"] = _expected(
        1 - seconds[CUT] / seconds[best], blocks[best], dropping_blocks(sparse), shape
    )
    handle.remove()
    return result | sizes | {
        "rounds": rounds,
        "dtype": str(next(dense.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(), "kernels": build.level(),
    }  # fmt: skip


def _repeated(ids: Tensor, rows: int, length: int) -> Tensor:
    return ids.repeat(rows, -(-length // ids.shape[1]))[:, :length]


def _expected(share: float, dense: Blocks, sparse: Blocks, shape: tuple[int, int]) -> float:
    """Amdahl's gain, by all blocks one after another on so many texts and tokens.

    ``share``: that of the MLPs in the dense model's time.
    """
    weight = dense[0].up.weight
    x = torch.randn(*shape, dense[0].d_model, dtype=weight.dtype, device=weight.device)

    def in_turn(blocks: Blocks) -> Callable[[], object]:  # so that no cache holds the next one
        modules = [block.path[block.around - 1] for block in blocks]
        return lambda: [module(x) for module in modules]

    with torch.inference_mode():
        times = interleaved({"dense": in_turn(dense), "sparse": in_turn(sparse)}, 21)
    gain = statistics.median(times["dense"]) / statistics.median(times["sparse"])
    return amdahl(share, gain)


@torch.inference_mode()
def _decode(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    """Greedy tokens [1, tokens] by a bare loop with a static cache."""
    held = static_cache(getattr(model, "_orig_mod", model), prompt.shape[1] + tokens)
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


@torch.inference_mode()
def _encode(model: Any, ids: Tensor) -> Tensor:
    states: Tensor = model(ids).last_hidden_state
    return states.clone()
