"""What observe promises whatever it measures: it changes nothing, and comes and goes freely."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actsparse
from actsparse.activations import ACTIVATIONS
from actsparse.blocks import find_mlp_blocks
from actsparse.observe import observe, session
from actsparse.values import check
from actsparse_lab import records
from tests.observe.brute import Recorder, same
from tests.zoo import BY_ID, call

D, H = 8, 24
X = torch.randn(4, 5, D)


def model_of(*activations: nn.Module, dropout: float = 0.0) -> nn.Module:
    """MLPs, one after the other, whose names are all empty: they go by their up layers."""
    parts: list[nn.Module] = []
    for act in activations or (nn.ReLU(), nn.GELU()):
        parts += [nn.LayerNorm(D), nn.Linear(D, H), act, nn.Dropout(dropout), nn.Linear(H, D)]
    return nn.Sequential(*parts)


def pristine(model: nn.Module) -> bool:
    return not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or any(key.startswith("_actsparse") for key in module.__dict__)
        or "forward" in module.__dict__
        for module in model.modules()
    )


# --- passive --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "id", ["t5-gated-gelu", "gpt2", "llama-relu", "opt-post-norm-350m", "phi3"]
)
def test_outputs_gradients_and_random_numbers_stay(id: str) -> None:
    results = []
    for observed in (False, True):
        model, inputs = BY_ID[id].build()
        model.train()
        seen = observe(model, inputs=inputs) if observed else None
        torch.manual_seed(1)
        out = call(model, inputs)[0]
        out.square().sum().backward()
        results.append(
            [
                out,
                torch.get_rng_state(),
                *(p.grad for p in model.parameters() if p.grad is not None),
            ]
        )
        if seen is not None:
            assert seen.summary("train") is not None
            seen.close()
            assert pristine(model)
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_state_dicts_and_parameters_stay() -> None:
    model = model_of()
    before = list(model.state_dict()), list(model.parameters())
    with observe(model, inputs=X):
        assert list(model.state_dict()) == before[0]
        assert all(a is b for a, b in zip(model.parameters(), before[1], strict=True))
    assert pristine(model)


def test_memory_does_not_grow_with_steps() -> None:
    model = model_of()

    def tensors() -> int:
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if issubclass(type(o), Tensor))

    with observe(model, inputs=X) as seen:
        model(X).sum().backward()
        first = tensors()
        for _ in range(5):
            model(X).sum().backward()
        assert tensors() <= first  # other tests' leftovers may go meanwhile
    assert seen.summary("train")["blocks"][0]["tokens"] == 6 * 20  # type: ignore[index]


# --- coming and going -----------------------------------------------------------------------------


def test_without_with_and_closed_twice() -> None:
    model = model_of()
    seen = observe(model, inputs=X)
    model(X)
    seen.close()
    seen.close()
    assert pristine(model)
    kept = seen.summary("train")
    model(X)
    assert seen.summary("train") == kept


def test_opened_again_it_counts_on() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(6, 4)
    seen = observe(model, inputs=x)
    tokens = []
    for step in range(4):
        (seen.close if step % 2 else seen.open)()
        model(x)
        row = seen.summary("train")
        assert row is not None
        tokens.append(row["blocks"][0]["tokens"])
    assert tokens == [6, 6, 12, 12]
    seen.close()


def test_closed_by_an_error() -> None:
    model = model_of()
    with pytest.raises(KeyError), observe(model, inputs=X):
        raise KeyError
    assert pristine(model)


def test_two_observers_and_a_tap_in_any_order() -> None:
    model = model_of()
    blocks, taps = find_mlp_blocks(model, X), []
    first = observe(model, blocks=blocks)
    handle = actsparse.sparsify(model, actsparse.ActivationPenalty("l1", 1.0), blocks=blocks)
    second = observe(model)  # the blocks of the handle
    taps.append(model(X))
    first.close()
    model(X)
    handle.remove()
    model(X)
    second.close()
    assert pristine(model)
    tokens = [seen.summary("train")["blocks"][0]["tokens"] for seen in (first, second)]  # type: ignore[index]
    assert tokens == [20, 60]


@pytest.mark.parametrize("old", ["gelu", "relu", "relu6"])
@pytest.mark.parametrize("new", ["jsrelu", "relu6", "gelu"])
def test_an_activation_swapped_and_swapped_back_while_watched(old: str, new: str) -> None:
    model = model_of({"gelu": nn.GELU(), "relu": nn.ReLU(), "relu6": nn.ReLU6()}[old])
    with torch.no_grad():
        model[1].weight.mul_(10)
    blocks = find_mlp_blocks(model, X)
    with observe(model, blocks=blocks) as seen:
        for name in (old, new, old):
            swap = None
            if name != old:
                swap = actsparse.sparsify(model, actsparse.SwapActivation(new), blocks=blocks)
            model(X)
            phi, z = ACTIVATIONS[name], model[1](model[0](X))
            got = seen.summary("train")
            assert got is not None
            assert got["density"] == pytest.approx((phi.value(z) != 0).double().mean())
            slope = phi.derivative(z)
            assert got["derivative_density"] == pytest.approx((slope != 0).double().mean())
            seen.reset()
            if swap is not None:
                swap.remove()
    assert pristine(model)


def test_while_an_activation_is_mixed_in() -> None:
    model = model_of(nn.GELU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = actsparse.sparsify(model, actsparse.SwapActivation("jsrelu", mix=2), inputs=X)
    handle.attach(optimizer, steps=4)
    with observe(model) as seen:
        densities = []
        for _ in range(4):
            model(X).sum().backward()
            optimizer.step()
            summary = seen.summary("train")
            assert summary is not None
            densities.append((summary["density"], summary["derivative_density"]))
            seen.reset()
    assert densities[0][0] > 0.99
    assert densities[0][1] > 0.99
    assert densities[-1][0] == densities[-1][1] < 0.99


def test_a_copy_of_a_watched_model_leaves_the_first_alone() -> None:
    model = model_of()
    with observe(model, inputs=X) as seen:
        copied = copy.deepcopy(model)
        copied(X)
        assert seen.summary("train") is None
        model(X)
    assert seen.summary("train")["blocks"][0]["tokens"] == 20  # type: ignore[index]
    with pytest.raises(ValueError, match="not part of this Sequential"):
        observe(copied, blocks=seen.blocks.values())


# --- phases, accumulation, compilation ------------------------------------------------------------


def test_training_and_inference_are_kept_apart() -> None:
    model = model_of(dropout=0.5)
    blocks = find_mlp_blocks(model, X)
    with observe(model, blocks=blocks) as seen:
        for _ in range(2):
            model.train()(X)
        with torch.no_grad():
            model.eval()(X[:1])
    for phase, tokens in (("train", 40), ("inference", 5)):
        assert [r["tokens"] for r in seen.summary(phase)["blocks"]] == [tokens] * 2  # type: ignore[arg-type, index]
    seen.reset("train")
    assert seen.summary("train") is None
    assert seen.summary("inference") is not None
    seen.reset()
    assert seen.summary("inference") is None


def test_accumulation_counts_every_micro_batch() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observe(model, inputs=X) as whole:
        model(X)
    with observe(model, inputs=X) as parts:
        for micro in X.split(1):
            model(micro).sum().backward()
        optimizer.step()
    assert parts.summary("train") == whole.summary("train")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", [True, False])
def test_compiled_whole(backend: str, function: bool) -> None:
    """Fullgraph; φ as a module or inside nn.TransformerEncoderLayer; with padding; both phases."""
    torch._dynamo.reset()
    if function:
        layer = nn.TransformerEncoderLayer(D, 2, H, batch_first=True, activation="gelu")
        model: nn.Module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        padding = torch.zeros(4, 5, dtype=torch.bool)
        padding[0, 2:] = True
        inputs: Any = {"src": X, "src_key_padding_mask": padding}
        keep = ~padding
    else:
        model, inputs, keep = model_of(nn.ReLU(), nn.GELU("tanh"), nn.ReLU6()), X, None
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    blocks = find_mlp_blocks(model, inputs)
    with observe(compiled, blocks=blocks) as seen:
        for _ in range(2):
            torch.manual_seed(1)
            out = call(compiled, inputs)
            out.sum().backward()
            with torch.no_grad():
                call(compiled.eval(), inputs)
            compiled.train()
        summaries = seen.summary("train"), seen.summary("inference")
    torch._dynamo.reset()
    with observe(model, blocks=blocks) as eager, Recorder(blocks) as brute:
        for _ in range(2):
            torch.manual_seed(1)
            call(model, inputs)
        assert same(
            eager.summary("train"), brute.summary(None if keep is None else keep.repeat(2, 1))
        )
        with torch.no_grad():
            for _ in range(2):
                call(model.eval(), inputs)
    assert summaries == (eager.summary("train"), eager.summary("inference"))


def test_compiled_steps_do_not_recompile() -> None:
    torch._dynamo.reset()
    model = model_of()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with observe(compiled, inputs=X), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            compiled(X).sum().backward()
    torch._dynamo.reset()


# --- words ----------------------------------------------------------------------------------------


def test_blocks_of_one_name_go_by_their_up_layers() -> None:
    model = model_of()
    with observe(model, inputs=X) as seen:
        model(X)
    assert list(seen.blocks) == ["1", "6"]
    assert seen.units("6", "train").shape == (H,)


def test_the_summary_fits_the_records() -> None:
    model = model_of()
    with observe(model, inputs=X) as seen:
        model(X)
    check("train", seen.summary("train"), records.MEASURES)


def test_the_table() -> None:
    model = model_of()
    with observe(model, inputs=X) as seen:
        model(X)
    text = str(seen)
    summary = seen.summary("train")
    assert summary is not None
    assert f"{1 - summary['density']:.2%}" in text
    for word in ("train", "inference", "no pass seen", "all", "dead", "derivative sparsity", " 6 "):
        assert word in text


def test_print(capsys: pytest.CaptureFixture[str]) -> None:
    observe(model_of(), inputs=X).print()
    assert "no pass seen" in capsys.readouterr().out


def test_errors_name_what_is_wrong() -> None:
    model = model_of()
    blocks = find_mlp_blocks(model, X)
    for options, message in [
        ({}, r"needs inputs= .* or blocks="),
        ({"inputs": X, "blocks": blocks}, "not both"),
        ({"blocks": []}, "blocks is empty"),
        ({"inputs": X, "measures": ["flat"]}, "unknown measure 'flat'; known: density"),
        ({"blocks": find_mlp_blocks(model_of(), X)}, "block '' is not part of this Sequential"),
    ]:
        with pytest.raises(ValueError, match=message):
            observe(model, **options)  # type: ignore[arg-type]
        assert pristine(model)
    with observe(model, "density", blocks=blocks) as seen:  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="unknown phase 'eval'; known: train, inference"):
        seen.summary("eval")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown block 'x'; known: 1, 6"):
        seen.units("x", "train")
    with pytest.raises(ValueError, match="'1' has seen no token in phase 'train'"):
        seen.units("1", "train")


def test_a_measure_is_a_small_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol later measures follow: their rows join those of density."""

    class Largest:
        columns = {"largest": ("largest", "{:.3f}".format)}  # noqa: RUF012

        def __init__(self, block: Any) -> None:
            self.value = torch.zeros(())

        @staticmethod
        def stages(site: Any) -> tuple[str, ...]:
            return ("y",)

        def update(self, site: Any, stages: dict[str, Tensor], keep: Tensor | None) -> None:
            self.value = torch.maximum(self.value, stages["y"].max())

        def reset(self) -> None:
            self.value.zero_()

        @staticmethod
        def summary(parts: dict[str, Any]) -> dict[str, Any]:
            rows = [{"block": name, "largest": float(p.value)} for name, p in parts.items()]
            return {"largest": max(row["largest"] for row in rows), "blocks": rows}

    monkeypatch.setitem(session.MEASURES, "largest", Largest)
    model = model_of(nn.ReLU())
    with observe(model, ("density", "largest"), inputs=X) as seen:
        y = model(X)
    summary = seen.summary("train")
    assert summary is not None
    assert summary["largest"] == summary["blocks"][0]["largest"] == pytest.approx(y.max().item())
    assert summary["blocks"][0]["units"] == H
    assert "largest" in str(seen)
