"""What the zoo does not have: rows of rows, and models that change when they run."""

from __future__ import annotations

import contextlib
import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call
from torch.nn.utils import parametrizations, spectral_norm
from transformers import DynamicCache

from actsparse import NoMLPFound, find_mlp_blocks, observe
from tests.zoo import BY_ID


class RowsOfRows(nn.Module):
    """One layer for a value [8], a gate [16] and an up [16]; the last two are split twice."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(8, 40)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        _, hidden = self.wide(x).split([8, 32], -1)
        gate, up = hidden.chunk(2, -1)
        return x + self.down(F.relu(gate) * up)


def test_rows_of_rows_are_those_of_the_layer() -> None:
    (block,) = find_mlp_blocks(RowsOfRows(), torch.randn(2, 3, 8))
    assert block.gate is not None
    assert (block.gate.rows, block.up.rows) == (slice(8, 24), slice(24, 40))
    assert block.d_hidden == 16


class Restless(nn.Module):
    """Draws random numbers in its activation and counts its calls in a buffer it exchanges."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 32), nn.RReLU(), nn.Linear(32, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x + self.down(self.act(self.up(x)))


def test_finding_and_watching_draw_no_random_numbers_and_run_no_counter() -> None:
    model, x = Restless().train(), torch.randn(2, 3, 8)
    before, buffer = torch.get_rng_state(), model.calls
    blocks = find_mlp_blocks(model, x)
    observe(model, blocks=blocks).close()
    assert torch.equal(torch.get_rng_state(), before)
    assert model.calls is buffer
    assert int(buffer) == 0
    assert model.training


def test_an_error_holds_what_was_refused() -> None:
    model, inputs = BY_ID["mixtral"].build()
    with pytest.raises(NoMLPFound) as caught:
        find_mlp_blocks(model, inputs)
    assert any("experts" in refused.name for refused in caught.value.refused)


# --- what is left as it was ----------------------------------------------------------------------


class Growing(nn.Module):
    """Keeps a table as long as its longest input, and how long it is, as dynamic RoPE does."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        self.register_buffer("table", torch.ones(2, 1))
        self.length, self._calls, self.log = 2, 0, None

    def forward(self, x: Tensor) -> Tensor:
        self._calls, self.log = self._calls + 1, x
        if x.shape[1] > self.length:
            self.length = x.shape[1]
            self.register_buffer("table", torch.ones(self.length, 1))
        return x + self.mlp(x) * self.table[: x.shape[1]]


def test_attributes_go_back_together_with_the_buffers_they_describe() -> None:
    model = Growing()
    table = model.table
    find_mlp_blocks(model, torch.randn(2, 5, 8))
    assert (model.length, model._calls, model.log) == (2, 0, None)
    assert model.table is table
    assert model(torch.randn(2, 5, 8)).shape == (2, 5, 8)


@pytest.mark.parametrize("fails", [False, True], ids=["works", "fails"])
def test_power_iterations_and_observers_stand_still(fails: bool) -> None:
    model = Plain().train()
    parametrizations.spectral_norm(model.up)
    spectral_norm(model.down)  # the old one, by a hook
    model.register_buffer("seen", torch.zeros(0))
    model.grows, model.fails, weight = True, fails, model.down.weight
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if fails:
        with pytest.raises(KeyError, match="from the model itself"):
            find_mlp_blocks(model, X)
    else:
        (block,) = find_mlp_blocks(model, X)
        assert (block.up.name, block.down.name) == ("up", "down")
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert model.training
    assert model.down.weight is weight


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = (
            nn.LayerNorm(8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)
        )  # fmt: skip
        self.grows = self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grows:
            self.seen.resize_(8).copy_(x.detach()[0, 0])
        y = x + self.down(self.act(self.up(self.norm(x))))
        if self.fails:
            raise KeyError("from the model itself")
        return y


class Counting(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_made_of_inference_tensors_is_found_and_left_alone(inside: bool) -> None:
    with torch.inference_mode():
        model = Counting() if inside else Plain()
    with torch.inference_mode(inside):
        (block,) = find_mlp_blocks(model, X)
    assert block.norm is not None
    assert not inside or int(model.calls) == 0


class Writing(Plain):
    """Writes into what it is called with."""

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        x += 1
        cache.append(x)
        return super().forward(x)


def test_inputs_stay_as_they_were() -> None:
    x, cache = X.clone().requires_grad_() * 1, [X.clone()]  # x has a graph
    assert len(find_mlp_blocks(Writing(), {"x": x, "cache": cache})) == 1
    assert torch.equal(x, X)
    assert len(cache) == 1


def test_a_key_value_cache_among_the_inputs_does_not_grow() -> None:
    model, inputs = BY_ID["llama"].build()
    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    cache = DynamicCache(config=model.config)
    find_mlp_blocks(model.eval(), {**inputs, name: cache, "use_cache": True})
    assert cache.get_seq_length() == 0


class Trying(Plain):
    """Falls back to its own layers where another way fails, as models do with fast kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = nn.Sequential(nn.Linear(8, 32), nn.Linear(8, 32))

    def forward(self, x: Tensor) -> Tensor:
        with contextlib.suppress(RuntimeError):
            return self.fast(x)
        return super().forward(x)


def test_an_error_that_the_model_catches_loses_no_block() -> None:
    found = find_mlp_blocks(nn.Sequential(Trying(), Plain()), X)
    rows = [(b.name, b.up.name, b.activation.name, b.norm.name) for b in found]
    assert rows == [(n, f"{n}.up", f"{n}.act", f"{n}.norm") for n in "01"]


# --- parts of other kinds ------------------------------------------------------------------------


class Within(nn.Module):
    """Calls its block under vmap, or with parameters that are not the model's."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.block, self.how = Plain(), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "vmap":
            return torch.func.vmap(self.block)(x)
        return functional_call(self.block, {k: v * 2 for k, v in self.block.named_parameters()}, x)


@pytest.mark.parametrize("how", ["vmap", "functional_call"])
def test_blocks_that_run_under_transforms_are_found(how: str) -> None:
    (block,) = find_mlp_blocks(Within(how), X)
    assert (block.norm.name, block.up.name) == ("block.norm", "block.up")


@pytest.mark.parametrize("kind", ["part", "norm", "act"])
def test_a_scripted_part_is_refused_by_name(kind: str) -> None:
    model = nn.Sequential(Plain(), Plain())
    name = "1" if kind == "part" else f"1.{kind}"
    if kind == "part":
        model[1] = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model.set_submodule(name, torch.jit.script(model.get_submodule(name)))
    blocks = find_mlp_blocks(model, X)
    assert [(r.name, r.reason.partition(",")[0]) for r in blocks.refused] == [(name, "TorchScript")]
    assert [b.norm and b.norm.name for b in blocks] == ["0.norm", *[None] * (kind == "norm")]


def test_a_scripted_model_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.trace(Plain(), X)
    with pytest.raises(ValueError, match="the model is TorchScript"):
        find_mlp_blocks(model, X)


@torch.no_grad()
def test_compiled_parts_run_as_written_and_keep_what_they_compiled() -> None:
    model, compiled = nn.Sequential(Plain(), Plain(), Plain()), CompileCounter()
    model[1].compile(backend=compiled)
    model[2] = torch.compile(model[2], backend=compiled)
    model(X)
    count = compiled.frame_count
    for _ in range(3):
        names = [block.up.name for block in find_mlp_blocks(model, X)]
        assert names == ["0.up", "1.up", "2._orig_mod.up"]
    model(X)
    assert compiled.frame_count == count > 0
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_dynamically_quantised_layers_are_found_and_counted() -> None:
    model = torch.ao.quantization.quantize_dynamic(Plain(), {nn.Linear}, dtype=torch.qint8).eval()
    hidden: list[Tensor] = []
    model.act.register_forward_hook(lambda *args: hidden.append(args[2]))
    with observe(model, inputs=X) as seen:
        hidden.clear()
        model(X)
    assert seen.summary("inference")["density"] == float((hidden[0] != 0).double().mean())
    (block,) = seen.blocks.values()
    assert (block.norm.name, block.up.width) == ("norm", 32)
    for part in (block.up, block.down):
        with pytest.raises(ValueError, match=r"holds no weight that can be read.*quantised"):
            part.weight  # noqa: B018
        with pytest.raises(ValueError, match="holds no bias that can be read"):
            part.bias  # noqa: B018


# --- without values ------------------------------------------------------------------------------


def test_a_model_on_meta_is_found_by_shapes() -> None:
    model = Plain().to("meta")
    (block,) = find_mlp_blocks(model, X.to("meta"))
    assert (block.norm.scale, block.activation.function, block.d_hidden) == ("weight", "relu", 32)
    with pytest.raises(ValueError, match=r"Plain does not run: its weights are on 'meta'"):
        find_mlp_blocks(model, X)
    with (
        observe(model.eval(), blocks=[block]),
        pytest.raises(ValueError, match="activations are on 'meta'"),
    ):
        model(X.to("meta"))


def test_layers_that_are_not_initialised_are_named() -> None:
    model = nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(8))
    with pytest.raises(ValueError, match=r"'0\.weight' is not initialised yet: run the model once"):
        find_mlp_blocks(model, X)
    model(X)
    assert len(find_mlp_blocks(model, X)) == 1
