"""The seam: stages as they are, hooks only where asked, nothing left behind."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actsparse import ActivationPenalty, SwapActivation, WeightNoise, ZerothBias, sparsify
from actsparse.activations import ACTIVATIONS
from actsparse.blocks import find_mlp_blocks
from actsparse.blocks.site import Site, site_of
from actsparse.modify.swap_activation import MixedActivation
from tests.zoo import call
from tests.zoo.ready import ready


class Tap:
    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self, site: Site, stages: dict[str, Tensor]) -> None:
        self.seen.append({key: value.detach().clone() for key, value in stages.items()})


FAMILIES = [
    "gpt2", "opt-pre-norm", "t5-relu", "t5-gated-gelu", "llama", "phi3", "swin", "modernbert",
    "nanogpt-inline-gelu", "nanochat-inline-squared-relu", "swiglu", "swiglu-interleaved-rows",
    "like-timm-with-mlp-norm", "sequential-relu-in-place", "one-activation-at-the-root",
    "one-activation-held-by-each-layer", "torch-encoder-gelu-pre-time_first", "time-first",
    "unknown-activation", "bloom", "whisper", "lora-gpt2-mlp", "lora-llama-mlp",
]  # fmt: skip


def applied(layer: Any, x: Tensor) -> Tensor:
    """A layer of a block by its matrix, with no call of the module."""
    base = getattr(layer.module, "base_layer", layer.module)
    weight = base.weight.T if layer.layout == "Conv1D" else base.weight
    out = nn.functional.linear(x, weight, base.bias)
    return out if layer.rows is None else out[..., layer.rows]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stages_are_what_the_formulas_say(name: str) -> None:
    """x Uᵀ + b = z, φ(z) (⊙ u) = a, and y = a Vᵀ + b′ where nothing stands between."""
    model, inputs, blocks = ready(name)
    for module in model.modules():
        if hasattr(module, "lora_B"):  # leave LoRA out of the formula
            for part in module.lora_B.values():
                nn.init.zeros_(part.weight)
    taps = [Tap() for _ in blocks]
    for block, tap in zip(blocks, taps, strict=True):
        site_of(block).tap(tap, ["x", "z", "u", "a", "y"])
    with torch.no_grad():
        call(model, inputs)
        for block, tap in zip(blocks, taps, strict=True):
            (seen,) = tap.seen
            assert set(seen) == (set("xzuay") if block.gated else set("xzay"))
            assert seen["x"].shape[-1] == seen["y"].shape[-1] == block.d_model
            assert seen["z"].shape[-1] == seen["a"].shape[-1] == block.d_hidden
            # sums of at most 64 products of numbers around 1, in another order
            close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
            close(seen["z"], applied(block.pre_activation, seen["x"]))
            a = block.activation.call(seen["z"].clone())
            if block.gated:
                close(seen["u"], applied(block.up, seen["x"]))
                a = a * seen["u"]
            close(seen["a"], a)
            if all(part.kind == "dropout" for part in block.between) and name != "bloom":
                close(seen["y"], applied(block.down, seen["a"]))


@pytest.mark.parametrize("name", FAMILIES)
def test_taps_change_no_output_and_leave_nothing_behind(name: str) -> None:
    model, inputs, blocks = ready(name)
    before = {path: sorted(vars(module)) for path, module in model.named_modules()}

    def hooks() -> int:
        return sum(
            len(value) for module in model.modules()
            for key, value in vars(module).items() if key.endswith("_hooks")
        )  # fmt: skip

    count = hooks()
    torch.manual_seed(1)
    model.train()  # no fast path, which sums in another order
    with torch.no_grad():
        plain = call(model, inputs)
    tap = Tap()
    for block in blocks:
        site_of(block).tap(tap, ["x", "z", "u", "a", "y"])
    torch.manual_seed(1)
    with torch.no_grad():
        seen = call(model, inputs)
    first = [
        v for v in (plain.values() if isinstance(plain, dict) else [plain]) if torch.is_tensor(v)
    ]
    second = [
        v for v in (seen.values() if isinstance(seen, dict) else [seen]) if torch.is_tensor(v)
    ]
    assert first
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for block in blocks:
        site_of(block).release(tap)
    assert {path: sorted(vars(module)) for path, module in model.named_modules()} == before
    assert hooks() == count


def test_a_site_hooks_its_block_once_and_leaves_nothing_behind() -> None:
    model, inputs, blocks = ready("gpt2")
    block = blocks[0]
    site, taps = site_of(block), [Tap(), Tap()]
    parts = [block.up.module, block.activation.module, block.down.module, *block.path]

    def hooked() -> list[tuple[int, ...]]:
        return [(*m._forward_hooks, *m._forward_pre_hooks) for m in parts if m is not None]

    site.tap(taps[0], ["y"])
    once = hooked()
    assert all(once[:3])
    site.tap(taps[1], ["x", "a"])  # compiled code would not see a hook that comes now
    assert hooked() == once
    call(model, inputs)
    assert [len(tap.seen) for tap in taps] == [1, 1]
    site.release(taps[0])
    assert hooked() == once
    site.release(taps[1])
    assert not any(hooked())
    assert not hasattr(block.up.module, "_actsparse_site")


def test_a_block_has_one_site_while_something_is_attached() -> None:
    _, _, blocks = ready("gpt2")
    tap = Tap()
    site = site_of(blocks[0])
    site.tap(tap, ["a"])
    assert site_of(blocks[0]) is site
    assert site_of(blocks[1]) is not site
    site.release(tap)
    assert site_of(blocks[0]) is not site


def test_unknown_stages_are_refused_and_u_is_left_out_where_there_is_no_gate() -> None:
    model, inputs, blocks = ready("gpt2")
    site, tap = site_of(blocks[0]), Tap()
    with pytest.raises(
        ValueError, match=r"unknown stages \['q'\]; known: x, z, u, a, l1, l2, d, y"
    ):
        site.tap(tap, ["z", "q"])
    site.tap(tap, ["u", "z"])
    call(model, inputs)
    assert set(tap.seen[0]) == {"z"}


def test_stages_given_as_a_function_follow_the_activation_in_force() -> None:
    model, inputs, blocks = ready("sequential")
    site, tap = site_of(blocks[0]), Tap()
    site.tap(tap, lambda site: ["a"] if site.function == "jsrelu" else ["z", "a"])
    call(model, inputs)
    phi = MixedActivation(ACTIVATIONS["jsrelu"], mixed=True)
    site.replace_activation(phi)
    call(model, inputs)
    site.release(phi)
    call(model, inputs)
    assert [set(seen) for seen in tap.seen] == [{"z", "a"}, {"a"}, {"z", "a"}]


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3", "nanogpt-inline-gelu", "swiglu"])
def test_every_transform_stands_at_its_place(name: str) -> None:
    model, inputs, blocks = ready(name)
    block = blocks[0]
    site, tap = site_of(block), Tap()
    layers: list[str] = []

    def shift(site: Site, x: Tensor) -> Tensor:
        return x + 1

    def double(site: Site, out: Tensor, x: Tensor, layer: Any) -> Tensor:
        layers.append(layer.name)
        return 2 * out

    def negate(site: Site, y: Tensor, a: Tensor, layer: Any) -> Tensor:
        layers.append(layer.name)
        return -y

    site.tap(tap, ["x", "z", "u", "a", "y"])
    with torch.no_grad():
        call(model, inputs)
        plain = tap.seen[0]
        site.transform_input(shift)
        site.transform_layers(double)
        site.transform_output(negate)
        call(model, inputs)
    seen = tap.seen[1]
    assert torch.equal(seen["x"], plain["x"] + 1)  # once, though two layers read it
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(seen["z"], 2 * applied(block.pre_activation, seen["x"]))
    want = block.activation.call(seen["z"])
    if block.gated:
        close(seen["u"], 2 * applied(block.up, seen["x"]))
        want = want * seen["u"]
    close(seen["a"], want)
    close(seen["y"], -applied(block.down, seen["a"]))
    entered = [block.up.name] if not block.gated or str(block.gate.name) == block.up.name else [
        block.gate.name, block.up.name]  # fmt: skip
    assert sorted(layers) == sorted([*entered, block.down.name])


def test_an_input_transform_is_not_served_stale_when_the_same_tensor_comes_again() -> None:
    """gate and up share one transformed x, but a second pass on the same tensor computes anew."""
    model, x, blocks = ready("bare-swiglu")
    site, count = site_of(blocks[0]), []

    def shift(site: Site, x: Tensor) -> Tensor:
        count.append(1)
        return x + len(count)

    site.transform_input(shift)
    first, second = model(x), model(x)
    assert len(count) == 2
    assert not torch.equal(first, second)


def test_the_derivative_is_that_of_the_activation_in_force() -> None:
    _, _, blocks = ready("gpt2")
    site = site_of(blocks[0])
    z = torch.linspace(-2, 2, 31)
    assert site.function == "gelu_tanh"
    torch.testing.assert_close(site.derivative(z), ACTIVATIONS["gelu_tanh"].derivative(z))
    phi = MixedActivation(ACTIVATIONS["jsrelu"], mixed=False)
    site.replace_activation(phi)
    phi.k.fill_(0.25)
    assert site.function is None
    want = 0.75 * ACTIVATIONS["gelu_tanh"].derivative(z) + 0.25 * ACTIVATIONS["jsrelu"].derivative(
        z
    )
    torch.testing.assert_close(site.derivative(z), want)
    phi.done = True
    assert site.function == "jsrelu"
    assert torch.equal(site.derivative(z), ACTIVATIONS["jsrelu"].derivative(z))
    site.release(phi)
    assert site.function == "gelu_tanh"


def test_an_unknown_activations_derivative_comes_from_autograd() -> None:
    _, _, blocks = ready("unknown-activation")
    z = torch.linspace(-2, 2, 31)
    torch.testing.assert_close(site_of(blocks[0]).derivative(z), 3 * torch.cos(3 * z))


def test_one_activation_is_replaced_at_a_time() -> None:
    _, _, blocks = ready("gpt2")
    site = site_of(blocks[0])
    phi = MixedActivation(ACTIVATIONS["relu"], mixed=True)
    site.replace_activation(phi)
    with pytest.raises(ValueError, match="replaced already"):
        site.replace_activation(MixedActivation(ACTIVATIONS["jsrelu"], mixed=True))
    assert site.modified
    site.release(phi)
    assert not site.modified


class Moody(nn.Module):
    """Calls its activation only when it feels like it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)
        self.bypass = False

    def forward(self, x: Tensor) -> Tensor:
        z = self.up(x)
        return self.down(z.clamp(min=0) if self.bypass else self.act(z))


def test_a_block_that_passes_its_activation_by_is_an_error_not_a_silence() -> None:
    model, x = Moody(), torch.randn(2, 4, 8)
    (block,) = find_mlp_blocks(model, x)
    site_of(block).replace_activation(MixedActivation(ACTIVATIONS["jsrelu"], mixed=True))
    model(x)
    model.bypass = True
    with pytest.raises(RuntimeError, match="without calling its activation 'act'"):
        model(x)


def test_an_activation_used_elsewhere_too_is_replaced_in_its_block_only() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            before = self.act(x)
            return before + self.down(self.act(self.up(before))) + self.act(-x)

    model, x = Twice(), torch.randn(2, 4, 8)
    (block,) = find_mlp_blocks(model, x)
    site_of(block).replace_activation(MixedActivation(ACTIVATIONS["squared_relu"], mixed=True))
    h = x.relu()
    a = applied(block.up, h).relu().square()
    want = h + applied(block.down, a) + (-x).relu()
    torch.testing.assert_close(model(x), want)


def test_an_override_of_forward_that_was_there_before_is_kept() -> None:
    model, x = Moody(), torch.randn(2, 4, 8)
    mine = lambda z: torch.relu(z) + 0  # noqa: E731
    model.act.forward = mine
    (block,) = find_mlp_blocks(model, x)
    site = site_of(block)
    phi = MixedActivation(ACTIVATIONS["jsrelu"], mixed=True)
    site.replace_activation(phi)
    assert model.act.forward is not mine
    site.release(phi)
    assert model.act.forward is mine


@pytest.mark.parametrize("name", ["gpt2", "swiglu", "phi3"])
def test_gradients_reach_the_stages_kept(name: str) -> None:
    model, inputs, blocks = ready(name)
    kept: dict[str, Tensor] = {}

    def keep(site: Site, stages: dict[str, Tensor]) -> None:
        for stage in ("x", "a", "y"):
            stages[stage].retain_grad()
        kept.update(stages)

    site_of(blocks[0]).tap(keep, ["x", "a", "y"])
    out = call(model, inputs)
    (out if torch.is_tensor(out) else out.logits).square().sum().backward()
    assert all(float(kept[stage].grad.abs().sum()) > 0 for stage in ("x", "a", "y"))
    down = blocks[0].down.module
    want = torch.einsum("btd,bth->dh", kept["y"].grad, kept["a"].detach())
    got = down.weight.grad.T if blocks[0].layout == "Conv1D" else down.weight.grad
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_an_activation_that_works_in_place_is_mixed_and_tapped_rightly() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 40), nn.ReLU(True), nn.Linear(40, 16))
    inputs = torch.randn(3, 6, 16)
    blocks = find_mlp_blocks(model, inputs)
    handle = sparsify(model, SwapActivation("gelu", mix=4), blocks=blocks)
    handle.load_state_dict({"step": 1, "steps": None})
    watch = Tap()
    site_of(blocks[0]).tap(watch, ["z", "a"])
    model(inputs).sum().backward()
    z, a = watch.seen[0]["z"], watch.seen[0]["a"]
    assert float(z.min()) < 0
    torch.testing.assert_close(a, 0.75 * z.relu() + 0.25 * nn.functional.gelu(z))
    site_of(blocks[0]).release(watch)
    handle.remove()


def test_the_taps_see_z_before_an_activation_that_works_in_place() -> None:
    model, inputs, blocks = ready("sequential-relu-in-place")
    watch = Tap()
    site_of(blocks[0]).tap(watch, ["z", "a"])
    call(model, inputs)
    assert float(watch.seen[0]["z"].min()) < 0
    assert torch.equal(watch.seen[0]["a"], watch.seen[0]["z"].relu())


# --- nn.TransformerEncoder and its fast path ---------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(  # torch makes nested tensors of batches only
    ("batch_first", "nested"), [(True, True), (True, False), (False, False)]
)
def test_the_encoders_fast_path_does_not_bypass_changes(batch_first: bool, nested: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 40, batch_first=batch_first, norm_first=not nested)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x = torch.randn(3, 6, 16)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = padding[2, 1:] = True
    arranged = x if batch_first else x.transpose(0, 1)
    handle = sparsify(model, [ZerothBias(), SwapActivation("jsrelu")], inputs=arranged)
    with torch.no_grad():
        for layer in model.layers:
            nn.init.normal_(layer.linear1.actsparse.zeroth_bias)
    before = [p.clone() for p in model.parameters()]
    slow = model(arranged, src_key_padding_mask=padding)  # gradients on: no fast path
    with torch.no_grad():
        fast = model(arranged, src_key_padding_mask=padding)
    keep = ~padding if batch_first else ~padding.T
    # two summation orders of ≤ 40 terms
    torch.testing.assert_close(fast[keep], slow[keep], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    handle.remove()
    assert getattr(model, "use_nested_tensor", nested) == nested
    with torch.no_grad():
        plain = model(arranged, src_key_padding_mask=padding)
    assert float((plain[keep] - fast[keep]).abs().max()) > 0.01


# --- the finder looks at a model as its user made it -------------------------------------------


@pytest.mark.filterwarnings("ignore:.*schedules stand still")  # no optimizer is followed
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "phi3", "t5-relu", "swiglu", "torch-encoder-relu-pre-batch_first",
             "sequential-relu-in-place"],
)  # fmt: skip
def test_the_finder_finds_the_same_in_a_model_to_which_things_are_attached(name: str) -> None:
    model, inputs, blocks = ready(name)
    tap = Tap()
    site_of(blocks[0]).tap(tap, ["z", "a"])
    handle = sparsify(
        model,
        [ZerothBias(finetune=True), SwapActivation("jsrelu", mix=4), WeightNoise(),
         ActivationPenalty()],
        blocks=blocks,
    )  # fmt: skip
    handle.load_state_dict({"step": 1, "steps": None})
    model.train()
    call(model, inputs)
    seen = len(tap.seen)
    again = find_mlp_blocks(model, inputs)
    assert [block.row() for block in again] == [block.row() for block in blocks]
    assert len(tap.seen) == seen  # an observer does not count the finder's pass
    assert handle.penalty().item() > 0  # nor does it take away what the penalty has seen
    assert site_of(again[0]) is site_of(blocks[0])
