"""Measures of gradients give one plain batch's numbers under the conditions people train in."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from actsparse import sparsify
from actsparse.blocks import find_mlp_blocks
from actsparse.observe import Seen, observe
from tests.mlp import Mlp
from tests.processes import in_two_processes

ALL = ("density", "flatness", "gradient", "noise")
D, H, B, T = 8, 24, 6, 5
X = torch.randn(B, T, D, dtype=torch.float64) + 1  # a common part, so that noise has a scale

# float64. Sums of at most B·T·H = 720 terms, each of fewer than 100 roundings of 2⁻⁵³, in an order
# that may differ: 1e-13 of each. The noise scale divides by ‖ḡ‖² − tr Σ/n, which cancels by
# 1 + scale/n, and `plain` asserts a scale below 100: 20 times that.
CLOSE = 1e-11


class Net(nn.Module):
    """Blocks, each behind a checkpoint where ``reentrant`` is not None."""

    def __init__(
        self,
        act: type[nn.Module] = nn.GELU,
        gated: bool = False,
        depth: int = 2,
        reentrant: bool | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Mlp(act(), D, H, norm=nn.LayerNorm(D), gated=gated) for _ in range(depth)
        )
        self.reentrant = reentrant
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.reentrant is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


KINDS = [(nn.ReLU, False), (nn.GELU, False), (nn.ReLU, True), (nn.SiLU, True)]


def losses(y: Tensor) -> Tensor:
    """Of each sample: [B]."""
    return (y - 2).square().flatten(1).mean(1)


def net(kind: tuple[type[nn.Module], bool] = KINDS[1], **options: Any) -> Net:
    torch.manual_seed(0)
    return Net(*kind, **options)


def numbers(summary: dict[str, Any]) -> dict[str, Any]:
    """Every number, those of blocks under the block's name; NaN where there is none."""
    parts = {"": summary, **{f"{row['block']} ": row for row in summary["blocks"]}}
    return {
        name + key: math.nan if value is None else value
        for name, part in parts.items()
        for key, value in part.items()
        if not isinstance(value, str | list)
    }


def close(summary: dict[str, Any], rel: float = CLOSE) -> Any:
    return pytest.approx(numbers(summary), rel=rel, abs=0, nan_ok=True)


def found(seen: Seen, phase: Any = "train") -> dict[str, Any]:
    summary = seen.summary(phase)
    assert summary is not None
    return summary


def plain(model: nn.Module, x: Tensor = X, **options: Any) -> dict[str, Any]:
    """One pass over the whole batch, as simply as can be."""
    with observe(model, ALL, inputs=x, **options) as seen:
        losses(model(x)).mean().backward()
    model.zero_grad()
    summary = found(seen)
    assert 0 < summary["noise_scale"] < 100
    return summary


# --- checkpointing --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_pass_counts_once(kind: Any, reentrant: bool) -> None:
    model = net(kind)
    want, blocks = plain(model), find_mlp_blocks(model, X)
    model.reentrant = reentrant
    with observe(model, ALL, blocks=blocks) as seen:
        losses(model(X.clone().requires_grad_())).mean().backward()
    assert numbers(found(seen)) == close(want)


# transformers 5.23 has renamed it; 5.0 knows only this name
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "t5-gated-gelu", "llama-relu", "vit-classifier"])
def test_hugging_face_checkpointing_counts_once(family: str, reentrant: bool) -> None:
    """With dropout, and padding where there are tokens: the second pass must see the first's."""
    from tests.zoo import BY_ID  # here, since processes that import this file need none of it

    model, inputs = BY_ID[family].build()
    model, inputs = model.double().train(), dict(inputs)  # type: ignore[arg-type]
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, 4:] = 0
        inputs["use_cache"] = False
    inputs = {k: v.double() if k == "pixel_values" else v for k, v in inputs.items()}
    blocks = find_mlp_blocks(model, inputs)
    summaries = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        with observe(model, ALL, blocks=blocks) as seen:
            for _ in range(2):
                model(**inputs).logits.flatten(1).square().mean(1).mean().backward()
        summaries.append(found(seen))
    assert summaries[0]["samples"] == 2 * 3
    assert numbers(summaries[1]) == close(summaries[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("measures", [("flatness", "gradient", "noise"), ("density",), ALL])
def test_checkpointing_still_saves_memory(kind: Any, reentrant: bool, measures: Any) -> None:
    """What a second pass computes dies with its layer's backward, as if nobody watched."""
    model = net(kind, depth=3)
    blocks = find_mlp_blocks(model, X)
    model.reentrant = reentrant
    alive: dict[bool, list[int]] = {False: [], True: []}
    for observed in (False, True):
        refs: list[Any] = []
        handles: list[Any] = []

        def remember(
            module: nn.Module, args: Any, out: Tensor, refs: list[Any] = refs, first: Any = None
        ) -> None:
            refs.extend(weakref.ref(t) for t in (*args, out) if t.shape[-1] == H)

        def count(gradient: Tensor, refs: list[Any] = refs, observed: bool = observed) -> None:
            alive[observed].append(sum(ref() is not None for ref in refs))

        seen = observe(model, measures, blocks=blocks) if observed else None
        x = X.clone().requires_grad_()
        y = model(x)
        for layer in model.layers:
            parts = [layer.up, layer.act, layer.down]
            handles += [part.register_forward_hook(remember) for part in parts]
        x.register_hook(count)  # when the first layer's backward is done
        losses(y).mean().backward()
        del y
        count(x)
        for handle in handles:
            handle.remove()
        assert refs  # the second pass was seen
        if seen is not None:
            seen.close()
    assert alive[True] == alive[False]


# --- accumulation ---------------------------------------------------------------------------------


@settings(max_examples=12)
@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4), kind=st.sampled_from(KINDS))
def test_micro_batches_add_up_to_the_batch(sizes: list[int], kind: Any) -> None:
    """Even or uneven: ``loss_scale`` is what the micro-batch's own mean was multiplied by.

    loss / k asks for 1/k however uneven the parts. Weighed by their sizes, so that the gradient
    is that of the whole batch, a part of n_i of n samples asks for n_i / n, or all for a sum / n.
    """
    torch.manual_seed(1)
    n, k = sum(sizes), len(sizes)
    model, x = net(kind), torch.randn(n, T, D, dtype=torch.float64) + 1
    with observe(model, ALL, inputs=x) as whole:
        losses(model(x)).mean().backward()
    share = 1.0
    ways: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
        "loss / k": ({"loss_scale": 1 / k}, lambda loss: loss.mean() / k),
        "n_i / n": ({"loss_scale": lambda: share}, lambda loss: loss.mean() * share),
        "sum": ({"loss_reduction": "sum"}, lambda loss: loss.sum()),
        "sum / n": ({"loss_reduction": "sum", "loss_scale": 1 / n}, lambda loss: loss.sum() / n),
    }
    for way, (options, reduce) in ways.items():
        with observe(model, ALL, inputs=x, **options) as seen:
            for part in x.split(sizes):
                share = len(part) / n
                reduce(losses(model(part))).backward()
        assert numbers(found(seen)) == close(found(whole)), way


def test_a_wrong_scale_would_show() -> None:
    model = net()
    with observe(model, ALL, inputs=X) as seen:
        for part in X.split(3):
            (losses(model(part)).mean() / 2).backward()
    want = plain(model)
    assert found(seen)["flatness"] == pytest.approx(want["flatness"] / 4)
    assert found(seen)["gradient_l1"] == pytest.approx(want["gradient_l1"] / 2)
    # neither depends on the scale of the loss
    assert found(seen)["density_from_flatness"] == pytest.approx(want["density_from_flatness"])
    assert found(seen)["noise_scale"] == pytest.approx(want["noise_scale"])


# --- compilation ----------------------------------------------------------------------------------


# torch's own compiler makes an instance, of which torch's Function warns
MESSAGE = "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"


def compiled(model: nn.Module, backend: str, late: bool, **options: Any) -> tuple[Any, Any]:
    """Three steps eagerly and three compiled, observed before or after compiling."""
    xs = [X, X.flip(0) + 0.5, X.flip(1) - 0.5]
    blocks = None if "_actsparse_handle" in model.__dict__ else find_mlp_blocks(model, X)
    torch._dynamo.reset()
    run = torch.compile(model, backend=backend, fullgraph=True) if late else None
    with observe(model, ALL, blocks=blocks, **options) as seen:
        if run is None:
            run = torch.compile(model, backend=backend, fullgraph=True)
        for i, x in enumerate(xs):
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                losses(run(x)).mean().backward()
    torch._dynamo.reset()
    with observe(model, ALL, blocks=blocks, **options) as eager:
        for x in xs:
            losses(model(x)).mean().backward()
    return found(seen), found(eager)


@pytest.mark.filterwarnings(MESSAGE)
def test_compiled_with_padding() -> None:
    mask = torch.ones(B, T)
    mask[0, 2:] = 0
    samples = torch.arange(B) != 3
    model = net(KINDS[2], depth=1)
    got, want = compiled(model, "aot_eager", late=True, mask=mask, sample_mask=samples)
    assert numbers(got) == close(want)


@pytest.mark.filterwarnings(MESSAGE)
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_before_it_is_observed(kind: Any) -> None:
    got, want = compiled(net(kind), "aot_eager", late=False)
    assert numbers(got) == close(want)


@pytest.mark.filterwarnings(MESSAGE)
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_as_sparsify_leaves_it(backend: str) -> None:
    model = net(KINDS[1], depth=1)
    sparsify(model, "paper", inputs=X)
    got, want = compiled(model, backend, late=True)
    assert numbers(got) == close(want)


@pytest.mark.filterwarnings(MESSAGE)
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_to_machine_code(kind: Any) -> None:
    got, want = compiled(net(kind), "inductor", late=True)
    assert numbers(got) == close(want)


# --- processes ------------------------------------------------------------------------------------


def _process(folder: str) -> None:
    rank = torch.distributed.get_rank()
    data = torch.load(f"{folder}/x.pt")
    model = net(KINDS[2])
    ddp = nn.parallel.DistributedDataParallel(model)
    with observe(model, ALL, inputs=data) as seen:
        losses(ddp(data.chunk(2)[rank])).mean().backward()
        if rank == 0:  # a pass that the other process knows nothing of
            losses(model.eval()(data)).mean().backward()
        seen.pool()
    both = {phase: seen.summary(phase) for phase in ("train", "inference")}  # type: ignore[arg-type]
    with observe(model, ALL[1:], inputs=data) as nobody:
        nobody.pool()
    both["nothing"] = nobody.summary("train")
    torch.save(both, f"{folder}/{rank}.pt")


def test_two_processes_pool_to_the_whole_batch(tmp_path: Path) -> None:
    torch.save(X, tmp_path / "x.pt")
    in_two_processes(_process, str(tmp_path))
    model = net(KINDS[2])
    want = plain(model)
    with observe(model.eval(), ALL, inputs=X) as seen:
        losses(model(X)).mean().backward()
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert numbers(got["train"]) == close(want)
        assert numbers(got["inference"]) == close(found(seen, "inference"))
        assert got["nothing"] is None
