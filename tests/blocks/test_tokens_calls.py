"""Whose call it is: nested, broken off, in threads, and run again in backward."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from actsparse import (
    ActivationPenalty,
    NormFloor,
    SwapActivation,
    WeightNoise,
    ZerothBias,
    sparsify,
)
from actsparse.blocks.token_map import TokenMap
from actsparse.blocks.tokens import tokens_of
from tests.blocks.stack import MASK, Stack, attached, ids
from tests.zoo import call
from tests.zoo.ready import built, fill


@pytest.fixture
def stack() -> Stack:
    return attached()


# --- whose call it is --------------------------------------------------------------------------


class MLP(nn.Module):
    """One block that takes a mask and leaves it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(2, 8), nn.LayerNorm(8)
        self.up, self.act, self.down = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        return x + self.down(self.act(self.up(self.norm(x))))


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x, attention_mask=mask)


class Inside(Stack):
    """Runs something in the middle of its own call, and looks again."""

    def __init__(self, act: Callable[[], Any]) -> None:
        super().__init__()
        self.act = act
        tokens_of((self,)).attach()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TokenMap:
        self.act()
        return tokens_of((self,)).now


def test_a_call_inside_a_call_leaves_the_outer_one_as_it_was() -> None:
    inner: list[TokenMap] = []

    def nest() -> None:
        if not inner:
            inner.append(None)
            inner[0] = stack(ids(3, 5))

    stack = Inside(nest)
    assert stack(ids(2, 4), MASK).keep(2, 4).tolist() == MASK.bool().tolist()
    assert inner[0].shape == (3, 5)
    assert inner[0].keep(3, 5) is None


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_call_that_is_broken_off_leaves_nothing_behind(error: type[Exception]) -> None:
    def fail() -> None:
        raise error

    stack = Inside(fail)
    with pytest.raises(error):
        stack(ids(2, 4), MASK)
    after = tokens_of((stack,)).now
    assert after.shape == ()
    assert after.keep(2, 4) is None


def test_a_call_that_the_keyboard_interrupts_is_forgotten_by_the_next() -> None:
    errors = [KeyboardInterrupt]

    def fail() -> None:
        if errors:
            raise errors.pop()

    stack = Inside(fail)
    with pytest.raises(KeyboardInterrupt):
        stack(ids(2, 4), MASK)
    assert stack(ids(2, 4)).keep(2, 4) is None
    assert tokens_of((stack,)).now.shape == ()


def test_after_a_call_its_mask_is_forgotten(stack: Stack) -> None:
    stack(ids(2, 4), MASK)
    assert tokens_of((stack,)).now.keep(2, 4) is None


def test_threads_see_their_own_calls() -> None:
    meet = threading.Barrier(2, timeout=20)
    stack = Inside(meet.wait)  # both are inside before either looks
    masks = [MASK, 1 - MASK]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda mask: stack(ids(2, 4), mask), masks))
    assert [each.keep(2, 4).long().tolist() for each in found] == [m.tolist() for m in masks]


@pytest.mark.parametrize("whole", [True, False], ids=["the stack", "a model around it"])
def test_threads_that_share_a_compiled_model_see_their_own_calls(whole: bool) -> None:
    model = MLP()
    sparsify(model, ZerothBias(length=6), inputs={"input_ids": ids(2, 4)})
    fill(model)
    model.eval()
    compiled = torch.compile(model if whole else Around(model), backend="eager", fullgraph=True)
    masks = [MASK, 1 - MASK, MASK.flip(0), torch.ones_like(MASK)]

    def run(i: int) -> tuple[int, Tensor]:
        with torch.no_grad():
            return i % 4, compiled(ids(2, 4), masks[i % 4])

    with torch.no_grad():
        want = [model(ids(2, 4), mask) for mask in masks]
    for i in range(4):
        run(i)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(400)))
    assert all(torch.equal(got, want[i]) for i, got in found)
    assert not all(torch.equal(want[0], other) for other in want)


# --- parts of a call, and calls run again in backward ------------------------------------------


def checkpointed(model: nn.Module, reentrant: bool = False) -> None:
    # its name from v6 on, and the one before
    switch = getattr(model, "activation_checkpointing_enable", None)
    (switch or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})


def test_a_model_that_feeds_its_mlp_in_chunks_is_told_that_positions_are_unknown() -> None:
    model, inputs = built("bert-chunked")
    sparsify(model, ZerothBias(finetune=True), inputs=inputs)
    with pytest.raises(ValueError, match=r"called on 2 of the 6 tokens.*chunk_size_feed_forward"):
        call(model, inputs)
    model.config.chunk_size_feed_forward = 0
    for layer in model.encoder.layer:
        layer.chunk_size_feed_forward = 0
    call(model, inputs)


class Checkpointed(nn.Module):
    """Two residual MLPs, each perhaps under gradient checkpointing."""

    def __init__(self, body: nn.Module, how: bool | None) -> None:
        super().__init__()
        self.body, self.how = body, how

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body.blocks:
            step: Callable[[Tensor], Tensor] = functools.partial(self._layer, layer)
            x = step(x) if self.how is None else checkpoint(step, x, use_reentrant=self.how)
        return self.body.head(x)

    @staticmethod
    def _layer(layer: Any, x: Tensor) -> Tensor:
        return x + layer["mlp"](layer["norm"](x))


RECIPE = [ZerothBias(finetune=True), SwapActivation("jsrelu"), WeightNoise(), NormFloor()]


@pytest.mark.parametrize("name", ["sequential", "swiglu", "sequential-like-torchvision"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("penalised", [False, True])
def test_gradient_checkpointing_changes_no_gradient(
    name: str, reentrant: bool, penalised: bool
) -> None:
    body, x = built(name)
    gradients = []
    for how in (None, reentrant):
        model = Checkpointed(copy.deepcopy(body), None)
        recipe = [*RECIPE, ActivationPenalty("hoyer", 0.5)] if penalised else RECIPE
        handle = sparsify(model, recipe, inputs=x)
        fill(model)
        model.how = how
        model.train()
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        loss = model(leaf).square().mean()
        if penalised and how is True:
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                handle.penalty()
            return
        (loss + handle.penalty()).backward()
        assert handle.penalty().item() == 0  # the second forward was not counted
        gradients.append([leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert any(float(g.abs().max()) > 0 for g in gradients[0])
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)  # sums in another order


@pytest.mark.parametrize("name", ["gpt2", "t5-relu"])
def test_hf_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    gradients = []
    for on in (False, True):
        model, inputs = built(name)
        model.config.use_cache = False
        handle = sparsify(model, [*RECIPE, ActivationPenalty("l1", 1.0)], inputs=inputs)
        fill(model)
        if on:
            checkpointed(model)
        model.train()
        torch.manual_seed(3)
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, :2] = 0
        loss = model(**inputs, attention_mask=mask).logits.square().mean()
        (loss + handle.penalty()).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for want, got in zip(*gradients, strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_padded_calls_before_one_backward_are_recomputed_at_their_own_positions(
    reentrant: bool,
) -> None:
    gradients = []
    for on in (False, True):
        model, inputs = built("gpt2")
        model.config.use_cache = False
        sparsify(model, ZerothBias(finetune=True), inputs=inputs)
        tables = fill(model)
        if on:
            checkpointed(model, reentrant)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, :2] = 0
        calls = [
            dict(inputs, attention_mask=mask),
            inputs,
            dict(inputs, attention_mask=mask.flip(0)),
        ]
        losses = [model(**given).logits.square().mean() for given in calls]
        with torch.no_grad():
            model(**inputs)  # another call on the way
        (losses[2] + 2 * losses[0] + 3 * losses[1]).backward()
        gradients.append([table.grad for table in tables])
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def again(forward: Callable[..., Any], reentrant: bool, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(functools.partial(forward, **kwargs), *args, use_reentrant=reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the inner one's
def test_a_checkpoint_inside_a_checkpoint_meets_the_same_call() -> None:
    body, _ = built("gpt2")
    gradients = []
    for how in (None, (True, True), (False, False), (True, False), (False, True)):
        model = copy.deepcopy(body).eval().double()
        sparsify(model, ZerothBias(finetune=True), inputs={"input_ids": ids(2, 6)})
        tables = fill(model)
        if how is not None:
            for block in model.transformer.h:
                for module, reentrant in ((block.mlp, how[0]), (block, how[1])):
                    module.forward = functools.partial(again, module.forward, reentrant)
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[0, :2] = 0
        loss = sum(
            model(input_ids=ids(2, 6), attention_mask=m, use_cache=False).logits.square().mean()
            for m in (mask, mask.flip(0))
        )
        loss.backward()
        gradients.append([table.grad for table in tables])
    for got in gradients[1:]:
        for want, each in zip(gradients[0], got, strict=True):
            torch.testing.assert_close(each, want, rtol=1e-5, atol=1e-7)


def test_calls_of_several_threads_that_numbers_do_not_tell_apart_are_refused() -> None:
    tokens = tokens_of((nn.Linear(2, 2),))
    one, two = TokenMap(mask=MASK.bool()), TokenMap()
    leaf = torch.ones(1, requires_grad=True)
    met: list[Any] = []

    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            met.append(tokens.now)
            return grad

    calls = tokens._calls.ended
    calls.extend([(range(10**9), two), (range(10**9), TokenMap())])
    Ask.apply(leaf).backward()
    assert met == [two]  # which of two that say the same makes no difference
    calls.append((range(10**9), one))
    with pytest.raises(RuntimeError, match="it is unknown which of 3"):
        Ask.apply(leaf).backward()
