"""Models of known sizes whose MLP blocks have a chosen density on the benchmark's own input.

What sparse execution gains depends on the density, and no trained model is at hand at each. So
the weights are random, and each hidden unit gets the threshold that leaves it active in the wanted
share of the tokens. Trained models spread their density unevenly over units and blocks: these
figures say what a density is worth, not which density training gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from actsparse import MLPBlock, find_mlp_blocks, observe

VIT_B: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "relu",
    "num_labels": 1000,
}
GPT2_SMALL: dict[str, Any] = {
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": 3072,
    "n_positions": 1024,
    "vocab_size": 50257,
    "activation_function": "relu",
    # the config's own 0.1 would draw other numbers in each program
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "use_cache": False,
}
T5_BASE: dict[str, Any] = {
    "d_model": 768,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_heads": 12,
    "d_kv": 64,
    "d_ff": 3072,
    "vocab_size": 32128,
    "feed_forward_proj": "relu",
    "decoder_start_token_id": 0,
}
LLAMA_135M: dict[str, Any] = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "hidden_act": "relu",
    "mlp_bias": True,  # the gate's are arranged; Llama's own have none
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
CLOSE = 2**-16  # of z's standard deviation; five times what float32 errs in GPT-2 small
PASSES = 10  # at most, of arranging a decoder on what it wrote itself
MEAN = 0.25  # of a T5 token's channels in the residual stream, whose standard deviation is 1


@dataclass
class Subject:
    """A model and what is timed of it.

    ``run(model)`` is a forward pass that returns logits and, in training, the loss; where
    ``training`` is False it is greedy decoding and returns logits and tokens. ``inputs`` are what
    finds the blocks; ``mlps`` says how often one MLP runs at how many tokens: (calls, T).
    """

    model: nn.Module
    inputs: dict[str, Tensor]
    run: Callable[[nn.Module], tuple[Tensor, Tensor]]
    training: bool
    mlps: list[tuple[int, int]]
    sizes: dict[str, Any]

    def blocks(self, model: nn.Module) -> list[MLPBlock]:
        """The MLP blocks of ``model``, this one or a copy."""
        return find_mlp_blocks(model, self.inputs)

    def densities(self) -> dict[str, Any]:
        """Measured over one run: ``density``, of all blocks, and ``blocks``, of each by name."""
        with observe(self.model, inputs=self.inputs) as seen, torch.no_grad():
            self.run(self.model)
        summary = seen.summary("train" if self.training else "inference")
        assert summary is not None
        rows = {row["block"]: row["density"] for row in summary["blocks"]}
        return {"density": summary["density"], "blocks": rows}


def arranged(name: str, density: float, dtype: str = "float32", **sizes: int) -> Subject:
    """The model called ``name``, its random weights arranged so that each block has ``density``.

    ``vit-b`` trains on 8 random images of 224 px, T = 1576, ``gpt2`` on 1 × 512 random ids, both
    without dropout; ``t5-base`` writes 32 tokens after 64 random ones. ``llama-135m`` decodes 32
    after 64 of a known random text, on which its density holds, in a loop over a static cache, and
    by ``generate`` as ``llama-135m-generate``. ``sizes`` replace settings of the Hugging Face
    config, ``batch``, ``prompt`` and ``length`` those numbers.

    Biases of up, or of the gate, are set to minus a quantile of z. T5 has none: there each token's
    channels have a mean of 0.25 in the residual stream, which no layer changes, and each row of up
    reads as much of this mean as its bias would be. A norm divides the mean and the other channels
    by the same number, so the quantile is of z over the mean. Its output layer is the embedding
    with the vocabulary shuffled: with random weights it would else repeat one token.

    ``dtype`` "bfloat16": what trains has float32 parameters and runs under autocast, as most
    training does; what decodes has parameters in bfloat16.

    Raises:
        ValueError: no such model, or a density outside (0, 1).
        ImportError: transformers is missing (``pip install "actsparse[train]"``).

    >>> subject = arranged("gpt2", 0.1, length=20, n_embd=8, n_layer=1, n_head=2, n_inner=30,
    ...                    vocab_size=50)
    >>> round(subject.densities()["density"], 3)
    0.1
    """  # fmt: skip
    check(name, [density])
    need_transformers()
    torch.manual_seed(0)
    subject = MODELS[name](density, **sizes)
    if dtype == "float32":
        return subject
    if not subject.training:
        subject.model.to(torch.bfloat16)
        return subject

    def cast(model: nn.Module) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return subject.run(model)

    return replace(subject, run=cast)


def need_transformers() -> None:
    """Raise the ImportError of a benchmark that has no models to time."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError('this benchmark needs pip install "actsparse[train]"') from error


def check(name: str, densities: Iterable[float]) -> None:
    """Raise the ValueError that :func:`arranged` would."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    for density in densities:
        if not 0 < density < 1:
            raise ValueError(f"density={density!r}: expected a number between 0 and 1")


def _vit_b(density: float, batch: int = 8, **sizes: int) -> Subject:
    from transformers import ViTConfig, ViTForImageClassification

    settings = {**VIT_B, **sizes}
    model = ViTForImageClassification(ViTConfig(**settings)).train()
    config = model.config
    pixels = torch.randn(batch, 3, config.image_size, config.image_size)
    labels = torch.randint(0, config.num_labels, (batch,))
    inputs = {"pixel_values": pixels, "labels": labels}
    tokens = batch * ((config.image_size // config.patch_size) ** 2 + 1)
    return _trained(model, inputs, density, tokens, {**settings, "batch": batch})


def _gpt2(density: float, batch: int = 1, length: int = 512, **sizes: int) -> Subject:
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {**GPT2_SMALL, **sizes}
    # ids that the vocabulary has, whatever its size
    model = GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=0, eos_token_id=0)).train()
    ids = torch.randint(0, model.config.vocab_size, (batch, length))
    inputs = {"input_ids": ids, "labels": ids}
    settings |= {"batch": batch, "length": length}
    return _trained(model, inputs, density, batch * length, settings)


def _trained(
    model: nn.Module, inputs: dict[str, Tensor], density: float, tokens: int, sizes: dict[str, Any]
) -> Subject:
    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        out = model(**inputs)
        return out.logits, out.loss

    subject = Subject(model, inputs, run, True, [], sizes)
    blocks = subject.blocks(model)
    subject.mlps.append((len(blocks), tokens))
    arrange(blocks, density, lambda: run(model))
    return subject


def _t5_base(density: float, prompt: int = 64, length: int = 32, **sizes: int) -> Subject:
    from transformers import T5Config, T5ForConditionalGeneration

    settings = {**T5_BASE, **sizes}
    model = T5ForConditionalGeneration(T5Config(**settings)).eval()
    _carry_mean(model)
    ids = torch.randint(2, model.config.vocab_size, (1, prompt))

    run = partial(_generated, ids, length)
    inputs = {"input_ids": ids, "decoder_input_ids": torch.zeros(1, 1, dtype=torch.int64)}
    settings |= {"prompt": prompt, "length": length}
    subject = Subject(model, inputs, run, False, [], settings)
    encoder = [block for block in subject.blocks(model) if block.name.startswith("encoder")]
    decoder = [block for block in subject.blocks(model) if block.name.startswith("decoder")]
    subject.mlps += [(len(encoder), prompt), (len(decoder) * length, 1)]
    arrange(encoder, density, lambda: model(**inputs))
    before = None
    for _ in range(PASSES):  # other thresholds may let it write another text
        tokens = run(model)[1][:, :-1].clone()
        if before is not None and tokens.equal(before):
            break
        before = tokens
        arrange(decoder, density, partial(model, input_ids=ids, decoder_input_ids=tokens))
    return subject


def _llama_135m(
    density: float, by_generate: bool = False, prompt: int = 64, length: int = 32, **sizes: int
) -> Subject:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {**LLAMA_135M, **sizes}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**settings, **ends)).eval()
    text = torch.randint(1, model.config.vocab_size, (1, prompt + length))
    run = partial(_generated_text if by_generate else _looped, text, prompt)
    inputs = {"input_ids": text[:, :prompt]}
    settings |= {"prompt": prompt, "length": length}
    subject = Subject(model, inputs, run, False, [], settings)
    blocks = subject.blocks(model)
    subject.mlps += [(len(blocks), prompt), (len(blocks) * (length - 1), 1)]
    arrange(blocks, density, lambda: model(input_ids=text[:, :-1], use_cache=False))
    return subject


def _generated(
    ids: Tensor, length: int, model: Any, processors: Sequence[Any] = ()
) -> tuple[Tensor, Tensor]:
    """Logits and tokens of ``generate``, the tokens from the one before the first that is new."""
    with torch.inference_mode():
        out = model.generate(
            ids,
            do_sample=False,
            num_beams=1,
            min_new_tokens=length,  # no early end
            max_new_tokens=length,
            return_dict_in_generate=True,
            output_logits=True,
            logits_processor=list(processors),
        )
    return torch.stack(out.logits, dim=1), out.sequences[:, -length - 1 :]


def _generated_text(text: Tensor, prompt: int, model: Any) -> tuple[Tensor, Tensor]:
    """The same where ``generate`` is told each next token [1, prompt + length]."""

    def told(ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, text[0, ids.shape[1]]] = float("inf")
        return scores

    logits, _ = _generated(text[:, :prompt], text.shape[1] - prompt, model, [told])
    return logits, torch.cat([text[:, prompt - 1 : prompt], logits.argmax(-1)], dim=1)


def static_cache(model: Any, length: int) -> dict[str, Any]:
    """What a model of transformers is called with to keep a static cache of ``length`` tokens."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=length)
    # transformers 5.24 calls it cache, and warns of the name before
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}


def _looped(text: Tensor, prompt: int, model: Any) -> tuple[Tensor, Tensor]:
    """The same by a bare loop over a static cache."""
    held = static_cache(model, text.shape[1])
    tokens, logits, token = [text[:, prompt - 1 : prompt]], [], text[:, :prompt]
    with torch.inference_mode():
        for at in range(prompt, text.shape[1]):
            logits.append(model(input_ids=token, logits_to_keep=1, **held).logits[:, -1])
            tokens.append(logits[-1].argmax(-1, keepdim=True))
            token = text[:, at : at + 1]
    return torch.stack(logits, dim=1), torch.cat(tokens, dim=1)


@torch.no_grad()
def _carry_mean(model: Any) -> None:
    """Give the residual stream of a T5 a mean over channels that no layer writes to."""
    embedding = model.shared.weight  # [vocabulary, D]
    embedding += MEAN - embedding.mean(1, keepdim=True)
    for name, module in model.named_modules():
        if name.endswith((".o", ".wo")):
            module.weight -= module.weight.mean(0, keepdim=True)
    order = torch.randperm(len(embedding))
    model.lm_head.weight = nn.Parameter(embedding[order].clone())


def arrange(blocks: Iterable[MLPBlock], density: float, run: Callable[[], object]) -> None:
    """Set the thresholds of ``blocks`` in the order in which ``run()`` runs them.

    A block's are set before it hands on its output, so that later ones see what they will see.
    """
    hooks = [
        block.pre_activation.module.register_forward_hook(partial(_arrange, block, density))
        for block in blocks
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()


def _arrange(
    block: MLPBlock, density: float, module: nn.Module, args: tuple[Tensor], z: Tensor
) -> Tensor:
    (x,) = args
    weight, bias = block.pre_activation.weight, block.pre_activation.bias
    if bias is not None:
        bias -= thresholds(z.flatten(0, -2), density)
    else:
        weight -= weight.mean(1, keepdim=True)
        mean = x.mean(-1, keepdim=True)
        level = thresholds(((x @ weight.t()) / mean).flatten(0, -2), density)
        weight -= level[:, None] / weight.shape[1]
    return module.forward(x)


def thresholds(z: Tensor, density: float) -> Tensor:
    """[H] such that ``z > threshold`` in the share ``density`` of z [T, H], as nearly as can be.

    A unit can be active in a whole number of the T tokens only: ⌊density · T + u⌋ of them, where
    the u of the units are spread evenly over [0, 1), so that their mean is right within 1 / (T H).
    The threshold lies midway between two tokens; where these are so close that rounding decides
    which of two programs finds the unit active, it is active in one token more.

    >>> z = torch.randn(10, 400)
    >>> float((z > thresholds(z, 0.01)).float().sum())
    40.0
    """
    tokens, units = z.shape
    u = (torch.randperm(units) + 0.5) / units
    count = (density * tokens + u).floor().long().clamp(max=tokens - 2)
    top = z.topk(int(count.max()) + 2, dim=0).values
    above = torch.cat([2 * top[:1] - top[-1:], top])  # for units that are never active
    edges = above.gather(0, torch.stack([count, count + 1, count + 2]))
    close = edges[0] - edges[1] < CLOSE * z.std()
    return torch.where(close, edges[1:], edges[:2]).mean(0)


MODELS: dict[str, Callable[..., Subject]] = {
    "vit-b": _vit_b,
    "gpt2": _gpt2,
    "t5-base": _t5_base,
    "llama-135m": _llama_135m,
    "llama-135m-generate": partial(_llama_135m, by_generate=True),
}
