"""Flatness against its definitions: weights copied for every token, sums token by token, bounds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actsparse import Recipe, SwapActivation, find_mlp_blocks, observe, sparsify
from actsparse.blocks import MLPBlock
from tests.observe.per_token import SLOPES, Recorder, by_copies, gelu_tanh_slope, layers_of
from tests.zoo.case import V
from tests.zoo.hf_decoders import GPT, GROUPED, lm
from tests.zoo.hf_encoders import SMALL, bert, images, t5

# Both sides are sums of positive terms, B·T·H = 720 of them at most, each a product of three
# rounded sums of squares: no cancellation, so that the relative error is below 720 · 2ε, 3e-13 in
# float64. In float32 the library adds up to H = 40 squares in float32, the rest in float64:
# three such factors are off by 3 · 41 · 6e-8 = 7e-6 at most.
RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5}

ROWS = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
TARGETS = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
JSRELU = Recipe("jsrelu", (SwapActivation(),))


def build(name: str, act: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
    """A model with dropout where its family has it, on a batch with padding; ``act``: its φ."""
    own = "relu" if act == "jsrelu" else act
    makes: dict[str, Callable[[], Any]] = {
        "vit": images(
            hf.ViTForImageClassification, hf.ViTConfig, num_labels=V, hidden_act=own, **SMALL
        ),
        "t5": t5(act=own),
        "t5-gated": t5(act=f"gated-{own}"),
        "gpt2": lm(hf.GPT2LMHeadModel, hf.GPT2Config, **GPT, activation_function=own),
        "llama": lm(hf.LlamaForCausalLM, hf.LlamaConfig, **GROUPED, hidden_act=own),
        "bert": bert(hf.BertForMaskedLM, hidden_act=own),
    }
    model, inputs = makes[name]()
    if name == "vit":
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    else:
        inputs["attention_mask"] = ROWS
    if name.startswith("t5"):
        inputs["decoder_attention_mask"] = TARGETS
    model.to(dtype).train()
    if act == "jsrelu":
        sparsify(model, JSRELU, inputs=inputs)
    return model, inputs


def losses(model: nn.Module, inputs: Any) -> Tensor:
    """Of each sample, the cross-entropy summed over its unpadded tokens: [B]."""
    torch.manual_seed(0)  # the same dropout each time
    logits = model(**inputs).logits
    labels = torch.arange(logits[..., 0].numel()).reshape(logits.shape[:-1]) * 5 % V
    each = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    each = each.reshape(labels.shape)
    return each if each.dim() == 1 else (each * kept("decoder", inputs)).sum(1)


def kept(block: str, inputs: Any) -> Tensor:
    """[B, T] of a block's tokens, False at padding."""
    mask = inputs.get("attention_mask")
    if "decoder" in block:
        mask = inputs.get("decoder_attention_mask", mask)
    return torch.ones(3, 5).bool() if mask is None else mask.bool()


# --- the definition: each token has its own copy of the weight -----------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["vit", "t5", "t5-gated", "gpt2", "llama", "bert"])
def test_flatness_is_the_squared_gradient_of_one_weight_copy_for_each_token(
    name: str, reduction: Any
) -> None:
    model, inputs = build(name, "gelu")
    blocks = find_mlp_blocks(model, inputs)

    def loss() -> Tensor:
        return getattr(losses(model, inputs), reduction)()

    with observe(model, "flatness", blocks=blocks, loss_reduction=reduction) as seen:
        loss().backward()
    # 1/3 squared is undone here and not in the loss: T5's and LLaMA's norms round to float32
    undo = 9 if reduction == "mean" else 1
    for block, row in zip(blocks, rows_of(seen), strict=True):
        for key, layer in layers_of(block).items():
            want = undo * by_copies(layer, loss, kept(block.name, inputs)) / 3
            assert row[key] == pytest.approx(want, rel=RELATIVE[torch.float64])
        assert row["flatness"] == row["flatness_gate" if block.gated else "flatness_up"]


def rows_of(seen: Any) -> list[dict[str, Any]]:
    summary = seen.summary("train")
    assert summary is not None
    return summary["blocks"]


def test_for_single_tokens_flatness_is_the_mean_squared_gradient_of_the_samples() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    with observe(model, "flatness", inputs=x) as seen:
        model(x).square().sum(1).mean().backward()
    squares = torch.zeros(2)
    for row in x:
        loss = model(row[None]).square().sum()
        for i, layer in enumerate((model[0], model[2])):
            squares[i] += torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() ** 2
    (block,) = rows_of(seen)
    assert (block["samples"], block["tokens_per_sample"]) == (5, 1)
    assert [block["flatness_up"], block["flatness_down"]] == pytest.approx(
        (squares / 5).tolist(), rel=1e-6
    )


# --- the identity, and every number from sums taken token by token -------------------------------


def numbers(parts: list[dict[str, float]], samples: int = 3) -> dict[str, float]:
    """What the summary must hold of blocks whose sums are ``parts``."""
    sums = {key: sum(part[key] for part in parts) for key in parts[0]}
    units = sum(part["tokens"] * part["H"] for part in parts)
    gates = {"flatness_gate": sums["gate"] / samples} if sums["gated"] else {}
    return gates | {
        "flatness": sums["gate"] / samples,
        "flatness_up": sums["up"] / samples,
        "flatness_down": sums["down"] / samples,
        "coefficient": sums["c"] / sums["on"],
        "density_from_flatness": sums["gate"] / (units * sums["c"] / sums["on"]),
        "input_norm": sums["x"] / sums["tokens"],
        "activation_gradient": sums["g"] / sums["on"],
        "effective_gradient": sums["η"] / sums["on"],
        "ratio": sums["gate"] / (units * sums["x"] / sums["tokens"] * sums["η"] / sums["on"]),
        "down_input_norm": sums["d"] / sums["tokens"],
        "samples": samples,
        "tokens_per_sample": sums["tokens"] / samples / len(parts),
        "skipped": 0,
    }


def recorded(name: str, act: str, dtype: torch.dtype = torch.float64) -> tuple[Any, list[Any]]:
    """The library's summary of one pass of a mean loss, and each block's sums by plain hooks."""
    model, inputs = build(name, act, dtype)
    blocks = list(find_mlp_blocks(model, inputs))
    recorder = Recorder(blocks)
    with observe(model, ["density", "flatness"], blocks=blocks) as seen, recorder.recording():
        losses(model, inputs).mean().backward()
    slope = gelu_tanh_slope if (name, act) == ("t5-gated", "gelu") else SLOPES[act]
    sums = [recorder.sums(i, kept(b.name, inputs), slope) for i, b in enumerate(blocks)]
    return seen.summary("train"), sums


def agrees(got: dict[str, Any], want: dict[str, float], dtype: torch.dtype) -> None:
    density = {"density", "derivative_density", "dead", "units", "living_density"}
    assert got.keys() - {"block", "blocks", "tokens"} - density == want.keys()
    assert {key: got[key] for key in want} == pytest.approx(want, rel=RELATIVE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("act", ["relu", "jsrelu", "gelu"])
@pytest.mark.parametrize("name", ["vit", "t5", "t5-gated", "gpt2", "llama", "bert"])
def test_density_is_flatness_over_its_coefficient(name: str, act: str, dtype: torch.dtype) -> None:
    summary, parts = recorded(name, act, dtype)
    agrees(summary, numbers(parts), dtype)
    for row, part in zip(summary["blocks"], parts, strict=True):
        agrees(row, numbers([part]), dtype)
        counted = part["on"] / (part["tokens"] * part["H"])  # by the hooks
        assert counted == row["derivative_density"]
        assert row["density_from_flatness"] == pytest.approx(counted, rel=RELATIVE[dtype])
        if act != "gelu":
            assert counted == part["active"] / (part["tokens"] * part["H"]) == row["density"]
            assert 0.1 < counted < 0.9


@pytest.mark.parametrize("name", ["vit", "t5", "llama"])
def test_without_the_slope_the_identity_is_far_off_under_jsrelu(name: str) -> None:
    summary, parts = recorded(name, "jsrelu")
    for row, part in zip(summary["blocks"], parts, strict=True):
        slots = part["tokens"] / 3 * part["H"]
        wrong = row["flatness"] / (slots * part["g without φ′"] / part["on"])
        assert wrong / row["density"] > 1.1  # φ′ = z + 1 > 1 wherever JSReLU is active


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("name", ["llama", "t5-gated"])
def test_gates_and_ups_flatness_in_terms_of_the_gradient_at_the_product(
    name: str, act: str
) -> None:
    """AF_gate = mean Σ ‖x‖² Σ g_a² z_up² φ′², AF_up = mean Σ ‖x‖² Σ g_a² φ²."""
    model, inputs = build(name, act)
    model.eval()  # no dropout, so that the product is down's input
    blocks = list(find_mlp_blocks(model, inputs))
    recorder, into_down = Recorder(blocks), {}
    for i, block in enumerate(blocks):

        def see(module: nn.Module, args: tuple[Any, ...], i: int = i) -> None:
            args[0].register_hook(lambda gradient: into_down.update({i: gradient}))

        block.down.module.register_forward_pre_hook(see)
    with observe(model, "flatness", blocks=blocks) as seen, recorder.recording():
        losses(model, inputs).mean().backward()
    slope = gelu_tanh_slope if (name, act) == ("t5-gated", "gelu") else SLOPES[act]
    summary = seen.summary("inference")
    assert summary is not None
    for i, row in enumerate(summary["blocks"]):
        at, g_a = recorder.values[i], 3 * into_down[i]
        x = at["into z"].square().sum(-1) * kept(blocks[i].name, inputs)
        gate = (x * (g_a * at["u"] * slope(at["z"])).square().sum(-1)).sum() / 3
        up = (x * (g_a * at["f"]).square().sum(-1)).sum() / 3
        assert row["flatness_gate"] == pytest.approx(gate.item(), rel=1e-10)
        assert row["flatness_up"] == pytest.approx(up.item(), rel=1e-10)


# --- ordinary gradients are bounded by flatness --------------------------------------------------


@functools.cache
def cached(name: str) -> tuple[nn.Module, Any, list[MLPBlock]]:
    model, inputs = build(name, "relu")
    return model.eval(), inputs, list(find_mlp_blocks(model, inputs))


def flatness_of(
    model: nn.Module, blocks: list[MLPBlock], loss: Callable[[], Tensor], **options: Any
) -> list[dict[str, Any]]:
    """Each block's numbers under ``loss``, and its weights' squared gradients: ``gradient``."""
    model.zero_grad()
    with observe(model, "flatness", blocks=blocks, **options) as seen:
        loss().backward()
    summary = seen.summary("inference")
    assert summary is not None
    for block, row in zip(blocks, summary["blocks"], strict=True):
        gradients = {key: layer.module.weight.grad for key, layer in layers_of(block).items()}
        row["gradient"] = {key: float(g.square().sum()) for key, g in gradients.items()}  # type: ignore[union-attr, operator]
    return summary["blocks"]


def masks(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


@settings(max_examples=8)
@given(
    st.integers(0, 2**16),
    st.lists(st.integers(1, 6), min_size=3, max_size=3),
    st.lists(st.integers(1, 4), min_size=3, max_size=3),
)
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_gradients_are_bounded_by_tokens_times_flatness(
    name: str, seed: int, lengths: list[int], targets: list[int]
) -> None:
    """‖∇_W ℓ_b‖² ≤ T_b AF_b, ‖∇_W mean_b ℓ_b‖² ≤ mean_b T_b AF_b."""
    model, inputs, blocks = cached(name)
    tokens = torch.randint(1, V, (3, 6), generator=torch.Generator().manual_seed(seed))
    inputs = inputs | {"input_ids": tokens, "attention_mask": masks(lengths, 6)}
    if name == "t5":
        inputs |= {"decoder_attention_mask": masks(targets, 4)}
    bounds: list[dict[str, float]] = [{} for _ in blocks]
    for b in range(3):
        rows = flatness_of(
            model,
            blocks,
            lambda b=b: losses(model, inputs)[b],  # type: ignore[misc]
            sample_mask=torch.arange(3) == b,
        )
        for i, row in enumerate(rows):
            assert row["tokens_per_sample"] == kept(blocks[i].name, inputs)[b].sum()
            for key, square in row["gradient"].items():
                bound = row["tokens_per_sample"] * row[key]
                assert square <= bound * (1 + 1e-12)
                bounds[i][key] = bounds[i].get(key, 0.0) + bound / 3
    for i, row in enumerate(flatness_of(model, blocks, lambda: losses(model, inputs).mean())):
        for key, square in row["gradient"].items():
            assert square <= bounds[i][key] * (1 + 1e-12)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_padding_gets_no_gradient_unless_the_loss_reads_it(name: str) -> None:
    """Attention gives padding a weight of exactly 0, so the bound may leave it out."""
    model, inputs, blocks = cached(name)
    recorder = Recorder(blocks)
    with recorder.recording():
        losses(model, inputs).mean().backward()
    for block, gradients in zip(blocks, recorder.gradients, strict=True):
        keep = kept(block.name, inputs)
        assert all((g[~keep] == 0).all() and (g[keep] != 0).any() for g in gradients.values())


def test_where_the_loss_reads_padding_the_bound_needs_all_tokens() -> None:
    """A mean over all positions, say: the ordinary gradient has what flatness leaves out."""
    model, inputs, blocks = cached("bert")
    inputs = inputs | {"attention_mask": masks([1, 1, 1], 6)}

    def loss() -> Tensor:
        return model(**inputs).logits[:, 1:].square().sum((1, 2)).mean()

    last = flatness_of(model, blocks, loss)[-1]
    assert last["gradient"]["flatness_down"] > last["tokens_per_sample"] * last["flatness_down"]
    last = flatness_of(model, blocks, loss, mask=lambda b, t: None)[-1]
    assert last["gradient"]["flatness_down"] <= last["tokens_per_sample"] * last["flatness_down"]


def test_tokens_that_are_alike_reach_the_bound() -> None:
    """With one direction only Cauchy–Schwarz is an equality, so that T cannot be left out."""
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6)).double()
    x = torch.randn(1, 1, 6, dtype=torch.float64).expand(1, 7, 6)
    with observe(model, "flatness", inputs=x) as seen:
        model(x).square().sum().backward()
    (row,) = rows_of(seen)
    square = model[0].weight.grad.square().sum().item()  # type: ignore[union-attr, operator]
    assert square == pytest.approx(7 * row["flatness_up"], rel=1e-12)
