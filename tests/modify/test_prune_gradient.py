"""Pruned gradients are those of a backward pass by hand, and nothing else changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from actsparse import PruneGradient, Recipe, accelerate, find_mlp_blocks, observe, sparsify
from actsparse.modify.recipe import recipe_named
from tests.blocks.test_drop import follows, small
from tests.processes import in_two_processes
from tests.zoo import call
from tests.zoo.ready import built, tensors

D, H = 6, 10


def block(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)).to(dtype)


# --- one block, by hand ------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.7, 1.5, 100.0])
def test_gradients_are_those_of_a_backward_pass_by_hand(threshold: float, in_place: bool) -> None:
    model, x = block(), torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    model[1].inplace = in_place
    plain = model(x)
    handle = sparsify(model, PruneGradient(threshold), inputs=x)
    y = model(x)
    assert torch.equal(y, plain)
    g_y = torch.randn_like(y)
    y.backward(g_y)

    (u, b), (v, _) = (
        (layer.weight.detach(), layer.bias.detach()) for layer in (model[0], model[2])
    )
    z = x.detach() @ u.T + b
    a = z.clamp(min=0)
    eta = (g_y @ v) * (z > 0)
    flags = small(eta.flatten().tolist(), threshold, slack=(H + 28) * 2.0**-52)
    assert None not in flags
    left = eta * ~torch.tensor(flags).reshape(eta.shape)
    kept = int((left != 0).sum())
    assert kept == {0.0: int((eta != 0).sum()), 100.0: 0}.get(threshold, kept)
    assert threshold in (0.0, 100.0) or 0 < kept < int((eta != 0).sum())
    for got, one, two in (
        (model[0].weight.grad, left, x.detach()),  # dU = η̂ᵀx
        (model[2].weight.grad, g_y, a),  # dV = g_yᵀa, whole
        (model[0].bias.grad, left, torch.ones_like(left[..., :1])),
    ):
        want = torch.einsum("bti,btj->ij", one, two).reshape(got.shape)
        terms = torch.einsum("bti,btj->ij", one.abs(), two.abs()).reshape(got.shape)
        # sums of 10 products of η, itself a sum of 6 with roundings of its own
        assert bool(((got - want).abs() <= 2 * (10 + D) * 2.0**-53 * terms).all())
    assert x.grad is not None
    bound = 2 * (H + D) * 2.0**-53 * (left.abs() @ u.abs())
    assert bool(((x.grad - left @ u).abs() <= bound).all())  # dx = η̂U
    assert handle.rows()[0]["change"] == f"|η| ≤ {threshold:g} · rms dropped at 0"


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    model, x = block(), torch.randn(3, D, dtype=torch.float64)
    sparsify(model, PruneGradient(1.0), inputs=x)
    (model(x).sum() * bad).backward()
    assert not model[0].weight.grad.isfinite().any()


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.gate(x)) * self.up(x))
        return out


def test_of_a_gated_block_up_keeps_its_whole_gradient() -> None:
    model, x = Gated(), torch.randn(3, 4, D)
    plain = gradients(model, x)
    sparsify(model, PruneGradient(1.0), inputs=x)
    pruned = gradients(model, x)
    changed = {key.split(".")[0] for key in plain if not torch.equal(pruned[key], plain[key])}
    assert changed == {"gate"}


# --- families ----------------------------------------------------------------------------------

FAMILIES = [
    "gpt2", "llama", "phi3", "t5-relu", "t5-gated-gelu", "opt-pre-norm", "bert-masked-lm",
    "swiglu-interleaved-rows", "torch-encoder-relu-pre-batch_first",
    "albert-one-layer-used-four-times", "time-first",
]  # fmt: skip


def ready(name: str) -> tuple[nn.Module, Any]:
    """A model of the zoo in train mode, without dropout, and what it runs on."""
    model, inputs = built(name)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key in ("attention_dropout", "dropout", "p"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    return model, inputs


def loss_of(model: nn.Module, inputs: Any) -> tuple[list[Tensor], Tensor]:
    outputs = tensors(call(model, inputs))
    return outputs, sum((out.float().square().mean() for out in outputs), torch.zeros(()))


def gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, inputs)[1].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_goes_on_to_the_layer_is_pruned_and_only_in_training(name: str) -> None:
    model, inputs = ready(name)
    outputs, _ = loss_of(model, inputs)
    plain = gradients(model, inputs)
    still = gradients(model.eval(), inputs)
    blocks = find_mlp_blocks(model, inputs)
    seen: list[tuple[Any, str, Tensor]] = []  # (block, before or after, gradient), by our hooks

    def keep(block: Any, which: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: seen.append((block, which, gradient.clone())))

        return hook

    hooks = [b.pre_activation.module.register_forward_hook(keep(b, "after")) for b in blocks]
    handle = sparsify(model, PruneGradient(0.5), blocks=blocks)
    hooks += [b.pre_activation.module.register_forward_hook(keep(b, "before")) for b in blocks]
    model.train()
    for got, want in zip(loss_of(model, inputs)[0], outputs, strict=True):
        assert torch.equal(got, want)
    seen.clear()
    pruned = gradients(model, inputs)
    dropped = 0
    for b in blocks:
        sides = [[g for of, side, g in seen if of is b and side == s] for s in ("before", "after")]
        assert len(sides[0]) == b.calls
        for before, after in zip(*sides, strict=True):
            layer = b.pre_activation
            eta, left = layer.select(before), layer.select(after)
            assert follows(left, eta, 0.5)
            dropped += int((left != eta).sum())
            if layer.rows is not None:  # the rest of a fused layer
                others = torch.ones(before.shape[-1], dtype=torch.bool)
                others[layer.rows] = False
                assert torch.equal(after[..., others], before[..., others])
    assert dropped > 0
    assert any(not torch.equal(pruned[key], plain[key]) for key in plain)
    same = gradients(model.eval(), inputs)
    assert all(torch.equal(same[key], still[key]) for key in still)
    for hook in hooks:
        hook.remove()
    handle.remove()
    again = gradients(model.train(), inputs)
    assert all(torch.equal(again[key], plain[key]) for key in plain)


# --- with others -------------------------------------------------------------------------------


class Deep(nn.Module):
    """Two residual blocks, checkpointed where told."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(torch.float32), block(torch.float32)
        self.how: dict[str, Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.first, self.second):
            x = x + (part(x) if self.how is None else checkpoint(part, x, **self.how))
        return x


def deep() -> tuple[Deep, Tensor]:
    torch.manual_seed(5)
    return Deep(), torch.randn(3, 4, D, requires_grad=True)


def exactly(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant: bool) -> None:
    model, x = deep()
    sparsify(model, PruneGradient(0.5), inputs=x)
    twin, _ = deep()
    sparsify(twin, PruneGradient(0.5), inputs=x)
    twin.how = {"use_reentrant": reentrant}
    assert exactly(gradients(twin, x), gradients(model, x))


def test_under_a_gradient_scaler() -> None:
    """A power of two rounds nothing, and what is unscaled are the same bits."""
    model, x = deep()
    sparsify(model, PruneGradient(0.5), inputs=x)
    plain = gradients(model, x)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, x)[1]).backward()
    scaler.unscale_(optimizer)
    assert exactly({n: p.grad for n, p in model.named_parameters()}, plain)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(loss_of(model, x)[1] * math.inf).backward()
    before = copy.deepcopy(model.state_dict())
    scaler.step(optimizer)  # sees the overflow, and skips
    assert exactly(before, model.state_dict())


def test_under_autocast() -> None:
    model, x = deep()
    blocks, seen = find_mlp_blocks(model, x), []
    part = model.second[0]

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: seen.append(gradient.clone()))

    part.register_forward_hook(hook)  # ahead of the site's, so that its gradient comes behind
    sparsify(model, PruneGradient(0.5), blocks=blocks)
    part.register_forward_hook(hook)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().mean().backward()
    before, after = seen
    assert before.dtype == torch.bfloat16
    assert follows(after, before, 0.5)
    assert 0 < int((after != 0).sum()) < int((before != 0).sum())


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_compiled_it_computes_the_same() -> None:
    model, x = deep()
    sparsify(model, PruneGradient(0.5), inputs=x)
    eager = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss_of(compiled, x)[1].backward()
    for name, p in model.named_parameters():
        # the same operations, save that sums of up to 12 products may come in another order
        bound = 64 * 2.0**-24 * float(eager[name].abs().max())
        assert float((p.grad - eager[name]).abs().max()) <= bound  # type: ignore[union-attr]


@pytest.mark.parametrize("first", ["observe", "sparsify"])
def test_observe_reads_the_gradient_before_the_block_drops(first: str) -> None:
    def sparsities(threshold: float | None) -> list[float]:
        model, x = deep()
        blocks = find_mlp_blocks(model, x)
        if first == "sparsify" and threshold is not None:
            sparsify(model, PruneGradient(threshold), blocks=blocks)
        with observe(model, "gradient", blocks=blocks) as seen:
            if first == "observe" and threshold is not None:
                sparsify(model, PruneGradient(threshold), blocks=blocks)
            loss_of(model, x)[1].backward()
        summary = seen.summary("train")
        assert summary is not None
        return [row["gradient_l2"] for row in summary["blocks"]]

    plain, pruned = sparsities(None), sparsities(1.0)
    assert pruned[1] == plain[1]
    assert pruned[0] != plain[0]  # what the second block dropped does not come to the first


def test_accelerated_its_blocks_run_by_their_layers() -> None:
    model, x = deep()
    handle = sparsify(model, PruneGradient(0.5), inputs=x)
    dense = gradients(model, x)
    with accelerate(model, blocks=handle.blocks, mode="sparse") as fast:
        assert exactly(gradients(model, x), dense)
        model.eval()(x)
        assert {row["program"] for row in fast.table()} == {"dense"}  # in evaluation too
        assert all("hidden layer" in row["reason"] for row in fast.table())
        handle.remove()
        model.train()(x)
        ran = [row["calls"] for row in fast.table() if row["reason"] is None]
        assert ran == [{"sparse": 1}] * 2


def test_with_the_papers_recipe_and_in_a_copy() -> None:
    model, inputs = ready("t5-relu")
    recipe = Recipe("both", (*recipe_named("paper").modifications, PruneGradient(0.5)))
    twin = copy.deepcopy(model)
    sparsify(twin, "paper", inputs=inputs)
    whole = gradients(twin.train(), inputs)
    handle = sparsify(model, recipe, inputs=inputs)
    other = copy.deepcopy(model)
    pruned = gradients(model.train(), inputs)
    handle.remove()
    assert exactly(gradients(other.train(), inputs), pruned)
    assert not exactly(pruned, whole)
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf], ids=str)
def test_bad_thresholds_are_named(threshold: float) -> None:
    with pytest.raises(ValueError, match=rf"threshold={threshold!r}.*a finite number, 0 or more"):
        PruneGradient(threshold)


# --- two processes -----------------------------------------------------------------------------


def halves() -> tuple[Deep, Tensor]:
    return deep()[0], torch.randn(8, 4, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_of_two_processes_each_prunes_its_own_batch(tmp_path: Path) -> None:
    in_two_processes(prune_half, tmp_path)
    model, x = halves()
    sparsify(model, PruneGradient(0.5), inputs=x)
    parts = [gradients(model, half) for half in x.split(4)]
    got = torch.load(tmp_path / "0.pt", weights_only=True)
    for name, gradient in got.items():
        want = (parts[0][name] + parts[1][name]) / 2
        # one addition and one quotient, in whatever order
        assert bool(((gradient - want).abs() <= 4 * 2.0**-24 * parts[0][name].abs().max()).all())


def prune_half(folder: Path) -> None:
    """In each of two processes."""
    rank = torch.distributed.get_rank()
    model, x = halves()
    sparsify(model, PruneGradient(0.5), inputs=x)
    wrapped = nn.parallel.DistributedDataParallel(model)
    loss_of(wrapped, x.split(4)[rank])[1].backward()
    torch.save({n: p.grad for n, p in model.named_parameters()}, folder / f"{rank}.pt")
