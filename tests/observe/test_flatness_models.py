"""Flatness on people's models: they run as they did, and the numbers are those of the formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsparse import find_mlp_blocks
from actsparse.observe import observe
from tests.observe.brute import D, Mlp
from tests.observe.per_token import alike, by_copies, layers_of, summary_of
from tests.zoo import BY_ID, call
from tests.zoo.case import ids, stream
from tests.zoo.hf_encoders import t5
from tests.zoo.plain import Residual
from tests.zoo.ready import tensors

ALL = ("density", "flatness", "gradient", "noise")


# --- nothing changes, and the identity holds ----------------------------------------------------


def results(model: nn.Module, inputs: Any) -> list[Tensor | None]:
    """Outputs, gradients and the random state of a training pass."""
    model.train()
    model.zero_grad()
    torch.manual_seed(1)
    out = [t for t in tensors(call(model, inputs)) if t.requires_grad]
    sum((t * torch.linspace(-1, 2, t.numel()).reshape(t.shape)).sum() for t in out).backward()  # type: ignore[union-attr]
    return [*out, *(parameter.grad for parameter in model.parameters()), torch.get_rng_state()]


def bit_identical(one: list[Tensor | None], two: list[Tensor | None]) -> bool:
    return len(one) == len(two) and all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(one, two, strict=True)
    )


def of_parts(*parts: nn.Module) -> tuple[nn.Module, Any]:
    layers = (nn.Linear(16, 40), *parts, nn.Linear(40, 16))
    return Residual(lambda: nn.Sequential(*copy.deepcopy(layers))), stream()


MODELS = {case.id: case.build for case in BY_ID.values() if case.blocks} | {
    "relu-in-place": lambda: of_parts(nn.ReLU(inplace=True), nn.Dropout(0.1)),
    "dropout-in-place": lambda: of_parts(nn.GELU(), nn.Dropout(0.1, inplace=True)),
}
del MODELS["sequential-relu-in-place"]  # x += … behind a LayerNorm: torch itself has no backward
NO_GRADIENT = {"nanochat-inline-squared-relu"}  # a down of zeros passes none on


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_zoo(name: str) -> None:
    model, inputs = MODELS[name]()
    blocks = find_mlp_blocks(model, inputs)
    alone = results(model, inputs)
    with observe(model, ALL, blocks=blocks, loss_reduction="sum") as seen:
        assert bit_identical(results(model, inputs), alone)
    summary = seen.summary("train")
    assert summary is not None
    assert summary["skipped"] == 0
    trained = [row for row in summary["blocks"] if "flatness" in row]
    # LoRA on attention alone: nothing that its first layer's MLP sees needs a gradient
    assert len(trained) == len(blocks) - (name == "lora-phi-attention")
    for row in trained:
        found = row["density_from_flatness"]
        if name in NO_GRADIENT:
            assert found is None
            assert row["flatness"] == 0
        else:  # float32 sums of at most 64 squares, three of them multiplied
            assert found == pytest.approx(row["derivative_density"], rel=3 * 65 * 1.2e-7)


LAYOUTS = {  # what is hard about it, how many samples the batch has
    "swin": ("windows of one picture", 3),
    "bert-chunked": ("a sample's tokens in three calls", 3),
    "albert-one-layer-used-four-times": ("one weight, four calls", 3),
    "albert-two-groups": ("two weights, two calls each", 3),
    "modernbert": ("fused gate and up, a dropout behind them", 3),
    "phi3": ("fused gate and up", 3),
    "swiglu-interleaved-rows": ("every second row of a fused layer", 3),
    "opt-pre-norm": ("rows flattened to [B·T, D]", 3),
    "gptj": ("attention and MLP side by side", 3),
    "bart": ("post-norm, encoder and decoder", 3),
    "torch-encoder-relu-post-time_first": ("[T, B, D]", 6),
    "torch-encoder-gelu-pre-batch_first": ("[B, T, D]", 3),
    "bare-sequential": ("rows of no sequence", 4),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_flatness_is_that_of_weight_copies_in_every_layout(name: str) -> None:
    model, inputs = BY_ID[name].build()
    model.double()
    if isinstance(inputs, dict):
        inputs = {key: t.double() if t.is_floating_point() else t for key, t in inputs.items()}
    else:
        inputs = inputs.double()
    blocks = find_mlp_blocks(model, inputs)
    model.train()

    def total() -> Tensor:
        torch.manual_seed(0)
        out = tensors(call(model, inputs))[0]
        return (out * torch.linspace(-1, 2, out.numel()).reshape(out.shape)).sum()

    summary = summary_of(model, total, blocks=blocks, loss_reduction="sum")
    samples = LAYOUTS[name][1]
    for block, row in zip(blocks, summary["blocks"], strict=True):
        assert row["samples"] == samples
        for key, layer in layers_of(block).items():
            # sums of positive terms; T5-like models round to float32 inside
            assert row[key] == pytest.approx(by_copies(layer, total) / samples, rel=1e-10)


def test_blocks_add_up() -> None:
    model, inputs = BY_ID["t5-relu"].build()
    summary = summary_of(
        model.train(), lambda: model(**inputs).logits.square().sum(), inputs=inputs
    )
    for key in ("flatness", "flatness_up", "flatness_down"):
        assert summary[key] == pytest.approx(sum(row[key] for row in summary["blocks"]), rel=1e-12)


def test_padding_that_only_labels_tell_of_is_left_out() -> None:
    model, inputs = t5()()
    labels = ids()[:, :4].clone()
    labels[1, 1:] = labels[2, 2:] = -100
    summary = summary_of(
        model.train(),
        lambda: model(**inputs, labels=labels).loss,
        inputs=inputs | {"labels": labels},
    )
    lengths = {row["block"][:7]: row["tokens_per_sample"] for row in summary["blocks"]}
    assert lengths == {"encoder": 6, "decoder": pytest.approx(7 / 3)}


# --- checkpointed, compiled ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["t5-relu", "llama"])
def test_gradient_checkpointing_measures_the_same(family: str, reentrant: bool) -> None:
    model, inputs = BY_ID[family].build()
    model.double().train()
    blocks = find_mlp_blocks(model, inputs)
    model.enable_input_require_grads()
    summaries = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        summaries.append(
            summary_of(
                model,
                lambda: model(**inputs, use_cache=False).logits.square().sum(),
                blocks=blocks,
            )
        )
    # T5's and LLaMA's norms round to float32, and need not round alike
    assert alike(*summaries, rel=1e-6)


# --- models that work in place ------------------------------------------------------------------


class GateIntoUp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        u = self.up(h)
        u *= self.act(self.gate(h))  # type: ignore[misc]
        return x + self.down(u)


class UpIntoGate(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        f = F.silu(self.gate(h))  # type: ignore[misc]
        f *= self.up(h)
        return x + self.down(f)


class InPlaceFunction(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x)), inplace=True))


class InPlaceModule(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)  # type: ignore[assignment]


class ResidualIntoOutput(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.act(self.up(self.norm(x))))
        y += x
        return y


def doubles() -> Tensor:
    return torch.randn(3, 4, D, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "phi", "gated"),
    [
        (GateIntoUp, "relu", True),
        (GateIntoUp, "silu", True),
        (UpIntoGate, "silu", True),
        (InPlaceFunction, "relu", False),
        (InPlaceModule, "relu", False),
        (ResidualIntoOutput, "gelu", False),
    ],
)
def test_what_works_in_place_keeps_working_and_measures_alike(
    kind: Any, phi: str, gated: bool
) -> None:
    model = (kind(phi, gated) if gated or phi != "relu" else kind()).double()
    twin, x = Mlp(phi, gated).double(), doubles()
    twin.load_state_dict(model.state_dict())
    alone = results(model, x)
    with observe(model, ALL, inputs=x) as seen:
        assert bit_identical(results(model, x), alone)
    with observe(twin, ALL, inputs=x) as expected:
        results(twin, x)
    assert alike(seen.summary("train"), expected.summary("train"))


def test_an_input_overwritten_behind_a_frozen_layer_is_no_error() -> None:
    """Torch keeps no input of a frozen layer for backward, so that the model may overwrite it."""

    class Frozen(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            x += self.down(self.act(self.up(x)))
            return x

    class Twin(Frozen):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            return x + self.down(self.act(self.up(x)))

    model, twin, x = Frozen().double(), Twin().double(), doubles().requires_grad_()
    twin.load_state_dict(model.state_dict())
    model.requires_grad_(False)
    got, want = (
        summary_of(each, lambda each=each: each(x).square().sum(), inputs=x)  # type: ignore[misc]
        for each in (model, twin)
    )
    assert alike(got, want)


# torch 2.13's own compiler instantiates a Function where it traces one
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_compiled_models_measure_the_same() -> None:
    model, x = GateIntoUp("silu", gated=True).double(), doubles()
    with observe(model, "flatness", inputs=x) as seen:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            compiled(x).square().sum().backward()
    want = summary_of(model, lambda: model(x).square().sum(), inputs=x)
    assert alike(seen.summary("train"), want, "samples")


class LateBias(nn.Module):
    """The bias joins between up and φ, which therefore does not act on up's output."""

    def __init__(self, inline: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 12, bias=False), nn.Linear(12, D)
        self.bias, self.inline = nn.Parameter(torch.linspace(-2, 2, 12)), inline
        self.act = nn.GELU()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        z = self.up(batch["x"]) + self.bias
        return self.down(z * torch.sigmoid(z) if self.inline else self.act(z))


def test_z_is_what_phi_gets_also_where_a_bias_joins_late() -> None:
    model, x = LateBias().double(), torch.randn(3, 5, D, dtype=torch.float64)
    with observe(model, ("density", "flatness"), inputs=({"x": x},)) as seen:
        model({"x": x}).square().sum().backward()
    summary = seen.summary("train")
    assert summary is not None
    assert summary["samples"] == 3  # though the model was given no tensor
    assert summary["density_from_flatness"] == pytest.approx(summary["derivative_density"], 1e-10)


def test_an_inline_activation_leaves_flatness_and_no_coefficient() -> None:
    model, x = LateBias(inline=True), torch.randn(3, 5, D)
    with observe(model, "flatness", inputs=({"x": x},)) as seen:
        model({"x": x}).square().sum().backward()
    summary = seen.summary("train")
    assert summary is not None
    assert summary["flatness"] > 0
    assert summary["coefficient"] is None
