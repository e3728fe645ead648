"""What cannot be done is said clearly, and the model is left as it was (issue item 8)."""

from __future__ import annotations

import copy
import errno
import functools
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actsparse import (
    ActivationPenalty,
    Blocks,
    NoMLPFound,
    NormFloor,
    Recipe,
    SwapActivation,
    WeightNoise,
    ZerothBias,
    find_mlp_blocks,
    handle_of,
    save,
    sparsify,
)
from actsparse.activations import ActivationFunction
from tests.zoo import NOTHING
from tests.zoo.ready import built, footprint


def refused(
    model: nn.Module, error: type[Exception], match: str, action: Callable[[], Any]
) -> None:
    """``action`` raises, and the model is untouched: values, structure and random state."""
    before, state = footprint(model), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    with pytest.raises(error, match=match):
        action()
    assert footprint(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


# --- the model and what it runs on -------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NOTHING))
def test_a_model_without_an_mlp_says_what_was_seen(name: str) -> None:
    model, inputs = NOTHING[name]()
    refused(model, NoMLPFound, "no MLP block found", lambda: sparsify(model, inputs=inputs))


def test_a_model_without_a_linear_layer_says_so() -> None:
    model = nn.Sequential(nn.ReLU(), nn.LayerNorm(8))
    refused(model, NoMLPFound, "no linear layer", lambda: sparsify(model, inputs=torch.ones(2, 8)))


def test_batched_experts_are_refused_by_name() -> None:
    model, inputs = built("mixtral")
    names = r"model\.layers\.0\.mlp\.experts: batched experts"
    refused(model, NoMLPFound, names, lambda: sparsify(model, inputs=inputs))


@pytest.mark.parametrize("inputs", ["text", 3, b"x", {1, 2}, iter([1])], ids=type)
def test_inputs_of_another_kind_are_named(inputs: Any) -> None:
    model, _ = built()
    refused(
        model, TypeError, f"a tensor, a tuple.*got {type(inputs).__name__}",
        lambda: sparsify(model, inputs=inputs),
    )  # fmt: skip


def test_no_inputs_and_no_blocks_asks_for_either() -> None:
    model, _ = built()
    refused(model, ValueError, "inputs=.*blocks=", lambda: sparsify(model))


@pytest.mark.parametrize(
    ("inputs", "error", "match"),
    [
        ({"inputs_ids": torch.ones(1, 3)}, ValueError, "input_ids"),
        ({"input_ids": torch.full((1, 3), 999)}, IndexError, "out of range"),
        ({"input_ids": torch.ones(1, 99, dtype=torch.long)}, IndexError, "out of range"),
        ((torch.randn(3, 4, 5, 6),), ValueError, "unpack|shape|dim"),
    ],
    ids=[
        "a word misspelt",
        "a token too large",
        "a sequence too long",
        "an image for a text model",
    ],
)
def test_inputs_the_model_cannot_run_bring_its_own_error(
    inputs: Any, error: type[Exception], match: str
) -> None:
    model, _ = built()
    model.train()
    before = footprint(model)
    with pytest.raises((error, TypeError, RuntimeError, IndexError)) as direct:
        model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    refused(
        model, type(direct.value), re.escape(str(direct.value)),
        lambda: sparsify(model, inputs=inputs),
    )  # fmt: skip
    assert footprint(model) == before


def test_an_interrupt_while_looking_leaves_the_model_alone() -> None:
    model, inputs = built()

    class Stop(Exception):
        pass

    def stop(*args: Any) -> None:
        raise Stop("enough")

    hook = model.transformer.h[1].register_forward_hook(stop)
    refused(model, Stop, "enough", lambda: sparsify(model, inputs=inputs))
    hook.remove()


@pytest.mark.parametrize("wrap", ["data parallel", "distributed"])
def test_a_wrapped_model_is_to_be_sparsified_before(wrap: str, tmp_path: Any) -> None:
    model, inputs = built()
    if wrap == "data parallel":
        wrapped: nn.Module = nn.DataParallel(model)
        refused(model, ValueError, "DataParallel.*before wrapping",
                lambda: sparsify(wrapped, inputs=inputs))  # fmt: skip
        return
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        refused(model, ValueError, "DistributedDataParallel.*before wrapping",
                lambda: sparsify(wrapped, inputs=inputs))  # fmt: skip
    finally:
        torch.distributed.destroy_process_group()


# --- twice -------------------------------------------------------------------------------------


def test_a_model_is_sparsified_once() -> None:
    model, inputs = built()
    handle = sparsify(model, ZerothBias(finetune=True), inputs=inputs)
    again = r"sparsified already \(recipe 'ZerothBias'\).*remove\(\)"
    refused(model, ValueError, again, lambda: sparsify(model, "paper-finetune", inputs=inputs))
    compiled = torch.compile(model, backend="eager")
    refused(model, ValueError, again, lambda: sparsify(compiled, "vanilla", inputs=inputs))
    handle.remove()
    sparsify(model, "paper-finetune", inputs=inputs)


def test_a_part_that_is_sparsified_and_a_whole_that_is() -> None:
    whole, inputs = built()
    part = whole.transformer
    handle = sparsify(part, ZerothBias(finetune=True), inputs=inputs)
    refused(whole, ValueError, "'transformer' is sparsified already",
            lambda: sparsify(whole, "paper-finetune", inputs=inputs))  # fmt: skip
    handle.remove()
    handle = sparsify(whole, SwapActivation(), inputs=inputs)
    refused(part, ValueError, "modified already",
            lambda: sparsify(part, ZerothBias(finetune=True), inputs=inputs))  # fmt: skip
    handle.remove()
    sparsify(part, "paper-finetune", inputs=inputs)


@pytest.mark.parametrize("first", ["input", "output"])
def test_a_recipe_takes_one_zeroth_bias(first: str) -> None:
    model, inputs = built()
    two = [ZerothBias(finetune=True, at=first), ZerothBias(finetune=True, at="output")]
    refused(model, ValueError, "zeroth bias already", lambda: sparsify(model, two, inputs=inputs))


def test_a_recipe_swaps_the_activation_once() -> None:
    model, inputs = built()
    two = [SwapActivation("relu"), SwapActivation("jsrelu")]
    refused(model, ValueError, "replaced already", lambda: sparsify(model, two, inputs=inputs))


# --- blocks ------------------------------------------------------------------------------------


def test_blocks_of_another_model_are_refused_and_neither_model_is_touched() -> None:
    """Else the changes would sit in one model and the handle on the other."""
    model, inputs = built()
    other, _ = built()
    blocks = find_mlp_blocks(other, inputs)
    untouched = footprint(other)
    refused(model, ValueError, "is not of this GPT2LMHeadModel: .*another model",
            lambda: sparsify(model, "paper-finetune", blocks=blocks))  # fmt: skip
    assert footprint(other) == untouched


def test_blocks_found_in_a_part_are_refused_for_the_whole() -> None:
    """Their names are the part's: saving and the optimizer look layers up by name."""
    model, inputs = built()
    blocks = find_mlp_blocks(model.transformer, inputs)
    refused(model, ValueError, "in a part of this one",
            lambda: sparsify(model, "paper-finetune", blocks=blocks))  # fmt: skip
    sparsify(model.transformer, "paper-finetune", blocks=blocks)


def test_blocks_whose_layers_were_exchanged_since_are_refused() -> None:
    model, inputs = built()
    blocks = find_mlp_blocks(model, inputs)
    model.transformer.h[0].mlp.c_fc = copy.deepcopy(model.transformer.h[0].mlp.c_fc)
    refused(model, ValueError, "replaced since",
            lambda: sparsify(model, "paper-finetune", blocks=blocks))  # fmt: skip


def test_an_empty_list_of_blocks_is_an_error_not_a_silence() -> None:
    model, _ = built()
    refused(model, ValueError, "empty", lambda: sparsify(model, "paper-finetune", blocks=[]))


def test_some_of_the_blocks_and_a_handles_blocks_are_welcome() -> None:
    model, inputs = built()
    blocks = find_mlp_blocks(model, inputs)
    handle = sparsify(model, ZerothBias(finetune=True), blocks=[blocks[1]])
    assert [name for name, _ in model.named_parameters() if "zeroth" in name] == [
        "transformer.h.1.mlp.c_fc.actsparse.zeroth_bias"
    ]
    handle.remove()
    sparsify(model, SwapActivation(), blocks=handle.blocks)


# --- recipes -----------------------------------------------------------------------------------


def test_an_unknown_recipe_lists_those_that_exist() -> None:
    model, inputs = built()
    for name in ("papers", "Paper", ""):
        message = f"unknown recipe {name!r}; known: vanilla, best, paper, paper-finetune"
        refused(model, ValueError, message, lambda r=name: sparsify(model, r, inputs=inputs))


@pytest.mark.parametrize(
    "recipe", [None, 3, ["paper"], [ZerothBias], ZerothBias, [NormFloor(), None], {"paper": 1}],
    ids=str,
)  # fmt: skip
def test_what_is_no_recipe_is_named(recipe: Any) -> None:
    model, inputs = built()
    refused(model, TypeError, "a recipe is made of modifications, got",
            lambda: sparsify(model, recipe, inputs=inputs))  # fmt: skip


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "floor negative": (lambda: NormFloor(-1.0), ValueError, "floor=-1.0"),
    "floor zero": (lambda: NormFloor(0), ValueError, "floor=0"),
    "floor nan": (lambda: NormFloor(float("nan")), ValueError, "floor=nan"),
    "uplift zero": (lambda: NormFloor(uplift=0), ValueError, "uplift=0"),
    "uplift negative": (lambda: NormFloor(uplift=-2), ValueError, "uplift=-2"),
    "uplift over 1": (lambda: NormFloor(uplift=1.5), ValueError, "uplift=1.5"),
    "clip negative": (lambda: ZerothBias(clip=-0.1), ValueError, "clip=-0.1"),
    "clip zero": (lambda: ZerothBias(clip=0.0), ValueError, "clip=0.0"),
    "clip nan": (lambda: ZerothBias(clip=float("nan")), ValueError, "clip=nan"),
    "length zero": (lambda: ZerothBias(length=0), ValueError, "length=0"),
    "length negative": (lambda: ZerothBias(length=-3), ValueError, "length=-3"),
    "length a float": (lambda: ZerothBias(length=2.5), ValueError, "length=2.5"),
    "at the side": (lambda: ZerothBias(at="side"), ValueError, "one of 'input', 'output'"),
    "activation": (lambda: SwapActivation("geglu"), ValueError, "'geglu'; known: .*jsrelu"),
    "activation empty": (lambda: SwapActivation(""), ValueError, "unknown activation ''"),
    "activation a module": (lambda: SwapActivation(nn.GELU()), ValueError, "GELU.*a name, or an"),
    "activation a function": (lambda: SwapActivation(torch.relu), ValueError, "a name, or an"),
    "mix zero": (lambda: SwapActivation(mix=0), ValueError, "mix=0"),
    "mix over 1": (lambda: SwapActivation(mix=2.0), ValueError, "mix=2.0"),
    "penalty": (lambda: ActivationPenalty("l7"), ValueError, "'l7'; known: hoyer, l1"),
    "penalty negative": (lambda: ActivationPenalty(weight=-1), ValueError, "weight=-1"),
    "penalty nan": (lambda: ActivationPenalty(weight=float("nan")), ValueError, "weight=nan"),
    "ramp zero": (lambda: ActivationPenalty(ramp=0), ValueError, "ramp=0"),
    "rho zero": (lambda: WeightNoise(0), ValueError, "rho=0"),
    "rho negative": (lambda: WeightNoise(-1), ValueError, "rho=-1"),
    "layers": (lambda: WeightNoise(layers=("gate",)), ValueError, "'up', 'down', 'att"),
    "layers none": (lambda: WeightNoise(layers=()), ValueError, "'up', 'down', 'att"),
    "layers a string": (lambda: WeightNoise(layers="up"), ValueError, "'up', 'down', 'att"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_bad_option_is_refused_when_it_is_written(name: str) -> None:
    make, error, match = BAD[name]
    with pytest.raises(error, match=match):
        make()


# --- what does not fit the model ---------------------------------------------------------------


class NoNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


def test_a_floor_without_a_norm_says_so_and_undoes_what_came_before_it() -> None:
    model, x = NoNorm(), torch.randn(2, 4, 8)
    refused(model, ValueError, "NormFloor fits none of the 1 blocks.*no norm feeds",
            lambda: sparsify(model, "paper", inputs=x))  # fmt: skip
    assert handle_of(model) is None
    sparsify(model, ZerothBias(), inputs=torch.randn(2, 4, 8))


def test_an_input_without_a_token_axis_asks_for_a_length() -> None:
    model, x = NoNorm(), torch.randn(4, 8)
    refused(model, ValueError, r"no token axis.*length=",
            lambda: sparsify(model, ZerothBias(), inputs=x))  # fmt: skip


def test_an_activation_no_hook_can_reach_says_what_to_do() -> None:
    class Inline(NoNorm):
        def forward(self, x: Tensor) -> Tensor:
            z = self.up(x)
            return x + self.down(z * (z > 0).to(z.dtype))

    model, x = Inline(), torch.randn(2, 4, 8)
    refused(model, ValueError, "Inline.forward.*call an activation module",
            lambda: sparsify(model, SwapActivation(), inputs=x))  # fmt: skip


def test_what_fits_some_blocks_only_is_told_for_each_that_it_does_not_fit() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bare, self.norm, self.normed = NoNorm(), nn.LayerNorm(8), NoNorm()

        def forward(self, x: Tensor) -> Tensor:
            x = self.bare(x)
            n = self.normed
            return x + n.down(n.act(n.up(self.norm(x))))

    model = Mixed()
    handle = sparsify(model, NormFloor(), inputs=torch.randn(2, 4, 8))
    rows = {row["block"]: row for row in handle.rows()}
    assert "no norm" in rows["bare"]["left_alone"]
    assert rows["normed"]["change"] == "norm.weight ≥ 1"
    assert "left alone: no norm feeds its up layer" in str(handle)


def test_an_optimizer_that_is_none_undoes_everything() -> None:
    model, inputs = built()
    recipe = Recipe("mine", (ZerothBias(finetune=True), SwapActivation(mix=0.5)))
    for optimizer, error, match in (
        ("adam", TypeError, "torch.optim.Optimizer, got str"),
        # a ramp over half of the training, whose length nobody said
        (torch.optim.SGD(model.parameters(), lr=0.1), ValueError, "steps="),
    ):
        use = functools.partial(sparsify, model, recipe, inputs=inputs, optimizer=optimizer)
        refused(model, error, match, use)
        assert handle_of(model) is None


def test_a_block_called_by_keyword_says_what_it_needs() -> None:
    class Keyword(NoNorm):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.act(self.up(input=x)))

    model, x = Keyword(), torch.randn(2, 4, 8)
    handle = sparsify(model, ZerothBias(), inputs=x)
    with pytest.raises(TypeError, match="up must be called with its input as an argument"):
        model(x)
    handle.remove()
    assert isinstance(handle.blocks, Blocks)
    model(x)


def test_save_takes_sparsified_models_and_functions_by_name_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sparsified"):
        save(nn.Linear(2, 2), tmp_path / "m")
    model, inputs = built()
    mine = ActivationFunction("mine", torch.sin, torch.cos)
    sparsify(model, SwapActivation(mine), inputs=inputs)
    with pytest.raises(ValueError, match="by name"):
        save(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on file sizes")
def test_a_real_limit_of_the_file_system_comes_as_an_oserror(tmp_path: Path) -> None:
    model, inputs = built()
    sparsify(model, ZerothBias(finetune=True), inputs=inputs)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(OSError, match=re.escape("model.safetensors")) as error:
            save(model, tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert error.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_an_oserror(tmp_path: Path) -> None:
    model, inputs = built()
    sparsify(model, ZerothBias(finetune=True), inputs=inputs)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save(model, tmp_path / "file" / "m")
