"""The finder against tables written by reading the models' source (tests/zoo)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as nn_module

from actsparse.blocks import NoMLPFound, find_mlp_blocks
from tests.zoo import BY_ID, CASES, LORA, NOTHING, Block, Build, Case, Inputs, Layer, call

MODES = [pytest.param(False, id="eval"), pytest.param(True, id="train")]

# --- reading a found block into the words of the tables ----------------------------------------


def layer_found(model: nn.Module, part: Any) -> Layer | None:
    if part is None:
        return None
    rows = part.rows
    if rows is not None:
        rows = range(*rows.indices(model.get_submodule(part.name).weight.shape[0]))
    return Layer(part.name, rows, part.layout)


def same_place(model: nn.Module, got: str, want: str) -> bool:
    """Equal names, a name that fits the pattern, or two paths to one shared module."""
    if got == want or fnmatchcase(got, want):
        return True
    everything = dict(model.named_modules(remove_duplicate=False))
    return got in everything and everything[got] is everything.get(want)


def found(model: nn.Module, block: Any, want: Block) -> dict[str, Any]:
    act = block.activation.name
    return {
        "name": block.name,
        "up": layer_found(model, block.up),
        "gate": layer_found(model, block.gate),
        "down": layer_found(model, block.down),
        "activation": want.activation if same_place(model, act, want.activation) else act,
        "function": block.activation.function,
        "norm": None if block.norm is None else (block.norm.name, block.norm.offset),
        "norm_position": block.norm_position,
        "norm_feeds": sorted(block.norm_feeds),
        "between": [(b.name, b.kind) for b in block.between],
        "sizes": (block.d_model, block.d_hidden),
        "gated": block.gated,
    }


def wanted(block: Block) -> dict[str, Any]:
    return {
        "name": block.name,
        "up": block.up,
        "gate": block.gate,
        "down": block.down,
        "activation": block.activation,
        "function": block.function,
        "norm": None if block.norm is None else (block.norm, block.offset),
        "norm_position": block.norm_position,
        "norm_feeds": sorted(block.norm_feeds),
        "between": list(block.between),
        "sizes": (block.d_model, block.d_hidden),
        "gated": block.gate is not None,
    }


def check(model: nn.Module, blocks: Any, case: Case) -> None:
    """Count, order and every field of every block; refusals by name, each with a reason."""
    got, want = [b.name for b in blocks], [b.name for b in case.blocks]
    assert (got, sorted(got))[not case.ordered] == (want, sorted(want))[not case.ordered]
    expected = {b.name: b for b in case.blocks}
    for block in blocks:
        assert found(model, block, expected[block.name]) == wanted(expected[block.name])
    refused = {r.name: r.reason for r in blocks.refused}
    assert set(case.refused) <= set(refused)
    assert all(refused[name] for name in case.refused)


# --- the families ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_model_builds_and_runs_without_warnings(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, inputs = case.build()
        for mode in (False, True):
            call(model.train(mode), inputs)
    names = dict(model.named_modules(remove_duplicate=False))
    for block in case.blocks:
        for part in (block.up, block.down, block.gate):
            assert part is None or part.name in names
        modules = [block.norm, *(n for n, _ in block.between if n != "dropout()")]
        assert all(n is None or n in names for n in modules)
        assert all(n == "residual" or n in names for n in block.norm_feeds)


@pytest.mark.parametrize("train", MODES)
@pytest.mark.parametrize("case", [c for c in CASES if c.blocks], ids=str)
def test_finds_every_field_of_every_block(case: Case, train: bool) -> None:
    model, inputs = case.build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blocks = find_mlp_blocks(model.train(train), inputs)
    check(model, blocks, case)


@pytest.mark.parametrize("case", [c for c in CASES if not c.blocks], ids=str)
def test_names_what_it_refuses_where_nothing_is_found(case: Case) -> None:
    model, inputs = case.build()
    try:
        refused = {r.name for r in find_mlp_blocks(model.eval(), inputs).refused}
    except NoMLPFound as error:  # then the message has to say what was refused
        refused = {name for name in case.refused if name in str(error)}
    assert set(case.refused) <= refused


@pytest.mark.parametrize("name", ["albert-one-layer-used-four-times", "bert-chunked", "phi3"])
def test_refuses_nothing_it_found(name: str) -> None:
    model, inputs = BY_ID[name].build()
    blocks = find_mlp_blocks(model.eval(), inputs)
    parts = {p.name for b in blocks for p in (b, b.up, b.down, b.gate) if p is not None}
    assert parts.isdisjoint(r.name for r in blocks.refused)


@pytest.mark.parametrize("build", NOTHING.values(), ids=NOTHING.keys())
def test_raises_where_there_is_no_mlp(build: Build) -> None:
    model, inputs = build()
    with pytest.raises(NoMLPFound) as error:
        find_mlp_blocks(model.eval(), inputs)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("case", LORA, ids=str)
def test_lora_layers_stand_for_the_layers_they_wrap(case: Case) -> None:
    pytest.importorskip("peft")
    model, inputs = case.build()
    check(model, find_mlp_blocks(model.eval(), inputs), case)


@pytest.mark.parametrize("name", ["llama", "nanogpt-inline-gelu", "bare-sequential"])
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called-before"])
def test_compiled_wrapper_gives_what_the_inner_model_gives(name: str, called: bool) -> None:
    model, inputs = BY_ID[name].build()
    compiled = torch.compile(model.eval(), backend="eager")
    if called:
        call(compiled, inputs)
    check(model, find_mlp_blocks(compiled, inputs), BY_ID[name])
    torch._dynamo.reset()


# --- the two libraries that may not load -------------------------------------------------------


def timm_vit() -> tuple[nn.Module, Inputs, dict[str, str]]:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    names = {"up": "fc1", "act": "act", "down": "fc2", "between": "drop1", "norm": "norm2"}
    return model, torch.randn(2, 3, 16, 16), {"name": "blocks.{}.mlp", **names}


def torchvision_vit() -> tuple[nn.Module, Inputs, dict[str, str]]:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=64
    )
    names = {"up": "0", "act": "1", "down": "3", "between": "2", "norm": "ln_2"}
    return (
        model,
        torch.randn(2, 3, 16, 16),
        {"name": "encoder.layers.encoder_layer_{}.mlp", **names},
    )


@pytest.mark.parametrize("make", [timm_vit, torchvision_vit])
def test_vision_libraries(make: Callable[[], tuple[nn.Module, Inputs, dict[str, str]]]) -> None:
    try:
        model, inputs, names = make()
    except Exception as error:  # torchvision beside a CPU torch: RuntimeError
        pytest.skip(f"{type(error).__name__}: {error}")
    blocks = find_mlp_blocks(model.eval(), inputs)
    assert [b.name for b in blocks] == [names["name"].format(i) for i in range(2)]
    for block in blocks:
        above = block.name.rpartition(".")[0]
        parts = (block.up.name, block.activation.name, block.down.name)
        assert parts == tuple(f"{block.name}.{names[p]}" for p in ("up", "act", "down"))
        assert [b.name for b in block.between] == [f"{block.name}.{names['between']}"]
        assert (block.norm.name, block.norm_position) == (f"{above}.{names['norm']}", "pre")
        assert (block.norm_feeds, block.gate, block.activation.function) == ((), None, "gelu")
        assert (block.d_model, block.d_hidden) == (16, 64)


# --- nothing is left behind --------------------------------------------------------------------

HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


def state(model: nn.Module) -> dict[str, Any]:
    """Everything a look at a model must leave as it was, in comparable form."""
    own = {n: {h: list(vars(m)[h]) for h in HOOKS} for n, m in model.named_modules()}
    everywhere = {n: list(v) for n, v in vars(nn_module).items() if n.startswith("_global_") and v}
    return {
        "modes": {n: m.training for n, m in model.named_modules()},
        "types": {n: type(m) for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "hooks": own,
        "global hooks": everywhere,
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "grads": {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        "identities": {n: id(p) for n, p in model.named_parameters()},
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "rng": torch.get_rng_state().tolist(),
    }


def assert_untouched(model: nn.Module, inputs: Inputs, act: Callable[[], Any]) -> None:
    tensors = copy.deepcopy({**model.state_dict(), **dict(model.named_buffers())})
    given = copy.deepcopy(inputs)
    before = state(model)
    act()
    assert state(model) == before
    after = {**model.state_dict(), **dict(model.named_buffers())}
    assert after.keys() == tensors.keys()
    assert all(torch.equal(tensors[n], after[n]) for n in tensors)
    values = [list(x.values()) if isinstance(x, dict) else [*x] for x in (given, inputs)]
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


UNTOUCHED = ["bert-masked-lm", "t5-relu", "batchnorm-stem", "torch-encoder-relu-post-batch_first"]


def mixed(name: str) -> tuple[nn.Module, Inputs]:
    """The model in train mode, but for one module; one weight frozen, one hook of the user's."""
    model, inputs = BY_ID[name].build()
    model.train()
    modules, parameters = list(model.modules()), list(model.parameters())
    modules[-1].eval()
    parameters[0].requires_grad_(False)
    modules[len(modules) // 2].register_forward_hook(lambda *_: None)
    return model, inputs


@pytest.mark.parametrize("name", UNTOUCHED)
def test_leaves_no_trace(name: str) -> None:
    model, inputs = mixed(name)
    assert_untouched(model, inputs, lambda: find_mlp_blocks(model, inputs))


@pytest.mark.parametrize("name", UNTOUCHED)
def test_leaves_no_trace_when_the_forward_fails(name: str) -> None:
    model, inputs = mixed(name)
    last = list(model.modules())[-1]

    def fail(*_: Any) -> None:
        raise KeyError("from the model itself")

    last.register_forward_hook(fail)

    def act() -> None:
        with pytest.raises(KeyError, match="from the model itself"):
            find_mlp_blocks(model, inputs)

    assert_untouched(model, inputs, act)


@pytest.mark.parametrize("name", UNTOUCHED)
def test_finding_twice_gives_the_same(name: str) -> None:
    model, inputs = BY_ID[name].build()
    for _ in range(2):
        check(model, find_mlp_blocks(model, inputs), BY_ID[name])


@pytest.mark.parametrize("name", ["bert-masked-lm", "torch-encoder-gelu-pre-batch_first"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_finds_without_gradients(name: str, context: Callable[[], Any]) -> None:
    """In eval without gradients `nn.TransformerEncoderLayer` would take its fused path."""
    model, inputs = BY_ID[name].build()
    with context():
        check(model, find_mlp_blocks(model.eval(), inputs), BY_ID[name])


def test_finds_in_bfloat16() -> None:
    case = BY_ID["t5-gated-gelu"]
    model, inputs = case.build()
    check(model, find_mlp_blocks(model.to(torch.bfloat16), inputs), case)
