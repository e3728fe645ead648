"""sparsify changes no number at the start, and remove() leaves no trace (issue item 4)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actsparse import (
    ActivationPenalty,
    Blocks,
    LeaveOutMLP,
    NormFloor,
    SwapActivation,
    WeightNoise,
    ZerothBias,
    handle_of,
    sparsify,
)
from actsparse.blocks.site import site_of
from actsparse.modify.zeroth_bias import CHILD
from tests.zoo import call
from tests.zoo.ready import fill, footprint, outputs, ready, same

FROM_SCRATCH = [ZerothBias(), NormFloor()]  # the paper recipe less JSReLU
FINETUNE = [ZerothBias(finetune=True), SwapActivation("jsrelu"), WeightNoise(), ActivationPenalty()]

RELU = [
    "vit-pooler-relu", "t5-relu", "opt-pre-norm", "llama-relu", "sequential-relu-in-place",
    "torch-encoder-relu-pre-batch_first", "torch-encoder-relu-pre-time_first",
    "torch-decoder-pre", "one-activation-held-by-each-layer", "time-first",
]  # fmt: skip
SMOOTH = [
    "vit-classifier", "deit-teacher", "swin", "clip", "whisper", "t5-gated-gelu", "modernbert",
    "gpt2", "neox-parallel", "neox-sequential", "falcon-rw-sequential", "bloom", "llama", "qwen2",
    "mistral", "gemma", "gemma2", "phi3", "nanogpt-inline-gelu", "sequential-like-torchvision",
    "like-timm-with-mlp-norm", "swiglu", "swiglu-interleaved-rows", "one-activation-at-the-root",
]  # fmt: skip
SHARED_NORM = [
    "bert-masked-lm", "roberta-masked-lm", "distilbert-masked-lm-vocab-is-d_model", "bart",
    "opt-post-norm-350m", "albert-one-layer-used-four-times", "albert-two-groups", "gptj", "phi",
    "falcon-7b-parallel", "wav2vec2-post-norm", "torch-encoder-relu-post-batch_first",
    "torch-decoder-post", "torch-transformer", "qwen2-moe-shared-expert",
]  # fmt: skip


def fresh(name: str) -> tuple[nn.Module, Any, Blocks]:
    """The same with its norms as initialised: no bias, effective scale 1."""
    model, inputs, blocks = ready(name)
    with torch.no_grad():
        for block in blocks:
            if block.norm is not None:
                scale, bias = block.norm.parameter("scale"), block.norm.parameter("bias")
                if scale is not None:
                    scale.fill_(1 - block.norm.offset)
                if bias is not None:
                    bias.zero_()
    return model, inputs, blocks


# --- bit for bit -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RELU + SMOOTH)
def test_a_fresh_model_computes_the_same_bits_under_zeroth_bias_and_norm_floor(name: str) -> None:
    model, inputs, blocks = fresh(name)
    before = outputs(model, inputs)
    handle = sparsify(model, FROM_SCRATCH, blocks=blocks)
    assert same(before, outputs(model, inputs))
    assert all("left_alone" not in row for row in handle.rows())
    fill(model)  # and the tables are really in the way: otherwise equality says nothing
    assert not same(before, outputs(model, inputs))


@pytest.mark.parametrize("name", SHARED_NORM)
def test_where_the_norm_feeds_more_the_floor_is_refused_by_name_or_allowed(name: str) -> None:
    model, inputs, blocks = fresh(name)
    before, untouched = outputs(model, inputs), footprint(model)
    norms = [block.norm.name for block in blocks if block.norm_feeds]
    others = [block.norm_feeds[0] for block in blocks if block.norm_feeds]
    if len(norms) == len(blocks):
        with pytest.raises(ValueError, match="fits none") as error:
            sparsify(model, FROM_SCRATCH, blocks=blocks)
        assert norms[0] in str(error.value)
        assert others[0] in str(error.value)
        assert "shared=True" in str(error.value)
        assert footprint(model) == untouched
    else:
        handle = sparsify(model, FROM_SCRATCH, blocks=blocks)
        refused = [row["left_alone"] for row in handle.rows() if "left_alone" in row]
        assert len(refused) == len(norms)
        assert all("shared=True" in reason for reason in refused)
        handle.remove()
    handle = sparsify(model, [ZerothBias(), NormFloor(shared=True)], blocks=blocks)
    assert all("left_alone" not in row for row in handle.rows())
    assert same(before, outputs(model, inputs))
    fill(model)
    assert not same(before, outputs(model, inputs))


def test_a_shared_norms_bias_stays_trainable_and_an_own_norms_bias_is_frozen() -> None:
    for name, frozen in (("bert-masked-lm", False), ("gpt2", True)):
        model, _, blocks = fresh(name)
        sparsify(model, ZerothBias(), blocks=blocks)
        assert all(b.norm.parameter("bias").requires_grad is not frozen for b in blocks)


@pytest.mark.parametrize("name", RELU + SMOOTH + SHARED_NORM)
def test_remove_restores_outputs_state_and_leaves_nothing_behind(name: str) -> None:
    model, inputs, blocks = ready(name)
    before, untouched = outputs(model, inputs), footprint(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    keys = list(model.state_dict())

    handle = sparsify(model, FINETUNE, blocks=blocks)
    fill(model)
    model.train()
    call(model, inputs)
    model.eval()
    assert not same(before, outputs(model, inputs))
    assert footprint(model) != untouched

    handle.remove()
    assert footprint(model) == untouched
    assert list(model.state_dict()) == keys
    assert same(before, outputs(model, inputs))
    for key, value in model.state_dict().items():
        if "running" not in key and "num_batches" not in key:  # BatchNorm moved in train mode
            assert torch.equal(value, state[key]), key
    assert handle_of(model) is None
    sparsify(model, FINETUNE, blocks=blocks).remove()  # and it can be done again


@pytest.mark.parametrize("name", ["t5-relu", "gpt2", "bert-masked-lm", "phi3", "swin"])
def test_a_vanilla_state_dict_lacks_the_zeroth_biases_only(name: str) -> None:
    model, inputs, blocks = fresh(name)
    vanilla = {key: value + 0.25 for key, value in model.state_dict().items()}
    sparsify(model, ZerothBias(), blocks=blocks)
    result = model.load_state_dict(vanilla, strict=False)
    assert result.unexpected_keys == []
    assert sorted(result.missing_keys) == sorted(
        f"{block.up.name}.{CHILD}.zeroth_bias" for block in blocks
    )
    plain, _, _ = fresh(name)
    plain.load_state_dict(vanilla)
    assert same(outputs(plain, inputs), outputs(model, inputs))


@pytest.mark.parametrize("name", ["gpt2", "vit-classifier", "torch-encoder-relu-pre-batch_first"])
def test_a_norm_bias_met_from_scratch_is_named_and_the_model_left_as_it_was(name: str) -> None:
    model, inputs, blocks = fresh(name)
    last = blocks[-1].norm  # the first block is changed before the last one is seen
    with torch.no_grad():
        last.parameter("bias")[3] = 1e-3
    before, untouched = outputs(model, inputs), footprint(model)
    with pytest.raises(ValueError, match="paper-finetune") as error:
        sparsify(model, "paper", blocks=blocks)
    assert f"{last.name}.bias" in str(error.value)
    assert footprint(model) == untouched
    assert same(before, outputs(model, inputs))
    sparsify(model, [ZerothBias(finetune=True)], blocks=blocks)
    assert same(before, outputs(model, inputs))


# --- torch.compile -----------------------------------------------------------------------------

# Dynamo makes an instance of every autograd.Function it traces, and torch warns of that
dynamo = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def compiled_agrees(name: str, backend: str, recipe: Any = None) -> None:
    model, inputs, blocks = ready(name)
    sparsify(model, recipe or [ZerothBias(finetune=True), SwapActivation("jsrelu")], blocks=blocks)
    fill(model)
    eager = outputs(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for a, b in zip(eager, outputs(compiled, inputs), strict=True):
        # the house's bound: 8 units in the last place of the largest number
        bound = 8 * torch.finfo(a.dtype).eps * float(a.abs().max())
        torch.testing.assert_close(b, a, rtol=0, atol=bound)
    torch._dynamo.reset()


@dynamo
@pytest.mark.parametrize(
    "name",
    ["gpt2", "opt-pre-norm", "llama", "phi3", "t5-relu", "vit-classifier", "bert-masked-lm",
     "torch-encoder-relu-pre-batch_first", "one-activation-held-by-each-layer", "swiglu"],
)  # fmt: skip
def test_the_whole_graph_compiles_and_computes_the_same(name: str) -> None:
    compiled_agrees(name, "eager")


@dynamo
def test_compiled_by_inductor_it_computes_the_same() -> None:
    compiled_agrees("sequential-relu-in-place", "inductor")


@dynamo
def test_a_change_after_compiling_is_seen_and_so_is_its_removal() -> None:
    model, inputs, blocks = ready("sequential-relu-in-place")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    plain = outputs(compiled, inputs)
    handle = sparsify(compiled, SwapActivation("jsrelu"), blocks=blocks)
    changed = outputs(compiled, inputs)
    assert not same(plain, changed)
    for a, b in zip(changed, outputs(model, inputs), strict=True):
        bound = 8 * torch.finfo(a.dtype).eps * float(a.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=bound)
    handle.remove()
    assert same(plain, outputs(compiled, inputs))
    torch._dynamo.reset()


# --- copies, company and odd homes -------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["gpt2", "llama", "t5-relu", "torch-encoder-relu-pre-batch_first", "swiglu",
     "one-activation-held-by-each-layer"],
)  # fmt: skip
def test_a_deep_copy_lives_on_its_own(name: str) -> None:
    model, inputs, blocks = ready(name)
    plain = outputs(model, inputs)
    handle = sparsify(model, FINETUNE, blocks=blocks)
    fill(model)
    changed = outputs(model, inputs)
    twin = copy.deepcopy(model)
    assert same(changed, outputs(twin, inputs))
    twin_handle = handle_of(twin)
    assert twin_handle is not handle
    assert twin_handle.model is twin

    fill(twin, seed=2)
    assert not same(changed, outputs(twin, inputs))
    assert same(changed, outputs(model, inputs))
    twin.train()
    call(twin, inputs)
    assert handle.penalty().item() == 0  # the original has not run in training mode
    assert twin_handle.penalty().item() > 0
    twin.eval()
    twin_handle.remove()
    assert same(plain, outputs(twin, inputs))
    assert same(changed, outputs(model, inputs))


class Watcher:
    """A tap that keeps what it saw, as an observer does."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self, site: Any, stages: dict[str, Tensor]) -> None:
        self.seen.append({key: value.detach().clone() for key, value in stages.items()})


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3", "torch-encoder-relu-pre-batch_first",
                                  "one-activation-held-by-each-layer"])  # fmt: skip
@pytest.mark.parametrize("order", ["tap out first", "model out first"])
def test_changes_and_taps_come_and_go_in_any_order(name: str, order: str) -> None:
    model, inputs, blocks = ready(name)
    untouched, plain = footprint(model), outputs(model, inputs)
    early, late = Watcher(), Watcher()
    site_of(blocks[0]).tap(early, ["x", "z", "a", "y"])
    if name.startswith("torch"):  # plain went by the fast path, whose kernel sums in another order
        torch.testing.assert_close(outputs(model, inputs), plain, rtol=0, atol=1e-5)
        plain_seen = outputs(model, inputs)
    else:
        plain_seen = plain
    assert same(plain_seen, outputs(model, inputs))
    first, before = early.seen[-1], len(early.seen)
    handle = sparsify(model, SwapActivation("jsrelu"), blocks=blocks)
    site_of(blocks[0]).tap(late, ["a"])
    outputs(model, inputs)
    assert torch.equal(early.seen[-1]["x"], first["x"])  # nothing before the first φ has changed
    assert torch.equal(early.seen[-1]["z"], first["z"])
    assert not torch.equal(early.seen[-1]["a"], first["a"])
    assert torch.equal(early.seen[-1]["a"], late.seen[-1]["a"])
    assert len(early.seen) == before + 1
    assert len(late.seen) == 1
    if order == "tap out first":
        site_of(blocks[0]).release(early, late)
        handle.remove()
    else:
        handle.remove()
        assert same(plain_seen, outputs(model, inputs))
        assert torch.equal(early.seen[-1]["a"], first["a"])
        site_of(blocks[0]).release(late)
        site_of(blocks[0]).release(early)
    assert footprint(model) == untouched
    assert same(plain, outputs(model, inputs))


def test_two_blocks_with_one_activation_module_can_be_changed_one_without_the_other() -> None:
    model, inputs, blocks = ready("one-activation-held-by-each-layer")
    act = blocks[0].activation.module
    assert act is blocks[1].activation.module
    plain, untouched = outputs(model, inputs), footprint(model)
    first, second = Watcher(), Watcher()
    site_of(blocks[0]).tap(first, ["z", "a"])
    site_of(blocks[1]).tap(second, ["z", "a"])
    handle = sparsify(model, SwapActivation("squared_relu"), blocks=Blocks(blocks[1:]))
    outputs(model, inputs)
    assert torch.equal(first.seen[0]["a"], first.seen[0]["z"].relu())
    assert torch.equal(second.seen[0]["a"], second.seen[0]["z"].relu().square())
    handle.remove()
    site_of(blocks[0]).release(first)
    site_of(blocks[1]).release(second)
    assert footprint(model) == untouched
    assert same(plain, outputs(model, inputs))


@pytest.mark.parametrize(
    ("name", "new"), [("nanogpt-inline-gelu", "relu"), ("nanochat-inline-squared-relu", "jsrelu"),
                      ("swiglu", "relu"), ("torch-encoder-activation-own-function", "gelu")],
)  # fmt: skip
def test_an_activation_called_as_a_function_is_exchanged_and_mixed(name: str, new: str) -> None:
    from actsparse.activations import ACTIVATIONS

    model, inputs, blocks = ready(name)
    old = ACTIVATIONS[blocks[0].activation.function].value
    for mix, k in ((None, 1.0), (4, 0.25)):
        handle = sparsify(model, SwapActivation(new, mix=mix), blocks=blocks)
        if mix is not None:
            handle.load_state_dict({"step": 1, "steps": None})
        watch = Watcher()
        site_of(blocks[0]).tap(watch, ["z", "a", "u"])
        outputs(model, inputs)
        z, a = watch.seen[0]["z"], watch.seen[0]["a"]
        want = (1 - k) * old(z) + k * ACTIVATIONS[new].value(z)
        if blocks[0].gated:
            want = want * watch.seen[0]["u"]
        # three roundings of numbers up to max |want|
        atol = 4 * torch.finfo(a.dtype).eps * float(want.abs().max())
        torch.testing.assert_close(a, want, rtol=0, atol=atol)
        site_of(blocks[0]).release(watch)
        handle.remove()


# --- shared blocks, and none at all ------------------------------------------------------


def test_a_block_used_four_times_adds_its_one_table_four_times() -> None:
    model, inputs, blocks = ready("albert-one-layer-used-four-times")
    assert [block.calls for block in blocks] == [4]
    sparsify(model, [ZerothBias(finetune=True), ActivationPenalty("l1", 1.0)], blocks=blocks)
    (table,) = fill(model)
    watch = Watcher()
    entries: list[Tensor] = []
    norm = blocks[0].norm.module
    hook = norm.register_forward_hook(lambda m, args, out: entries.append(out.detach().clone()))
    site_of(blocks[0]).tap(watch, ["x", "a"])
    model.train()
    call(model, inputs)
    hook.remove()
    assert len(watch.seen) == len(entries) == 4
    for seen, entry in zip(watch.seen, entries, strict=True):
        assert torch.equal(seen["x"], entry + table[: entry.shape[1]])
    want = torch.stack([seen["a"].abs().mean() for seen in watch.seen]).mean()
    torch.testing.assert_close(handle_of(model).penalty(), want)


def test_leaving_the_mlps_out_leaves_the_residual_stream_alone() -> None:
    model, inputs, blocks = ready("sequential")
    sparsify(model, LeaveOutMLP(), blocks=blocks)
    assert torch.equal(model(inputs), model.head(inputs))
