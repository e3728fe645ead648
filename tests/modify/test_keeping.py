"""What a model keeps and gives back: pickles, optimizers, errors under a compiler."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from actsparse import WeightNoise, ZerothBias, sparsify
from tests.modify.test_note import mlp
from tests.zoo import BY_ID

X = torch.randn(2, 5, 8)


def test_a_modified_model_pickles() -> None:
    model = mlp()
    sparsify(model, "paper", inputs=X)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(X), model(X))


def test_an_optimizer_forgets_what_it_was_lent() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    before = [len(group["params"]) for group in optimizer.param_groups]
    handle = sparsify(model, "paper", inputs=X, optimizer=optimizer)
    model(X).sum().backward()
    optimizer.step()
    lent = set(map(id, model.parameters()))
    handle.remove()
    assert [len(group["params"]) for group in optimizer.param_groups] == before
    gone = lent - set(map(id, model.parameters()))
    assert len(gone) == 1
    assert not gone & {id(parameter) for parameter in optimizer.state}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("compiled", [False, True])
def test_a_sequence_too_long_for_the_table_says_so(compiled: bool) -> None:
    model, inputs = BY_ID["gpt2"].build()
    ids = inputs["input_ids"]
    sparsify(model, ZerothBias(length=ids.shape[1] - 1, finetune=True), inputs=inputs)
    run = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(ValueError, match="beyond the zeroth bias table"):
        run(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_noise_of_small_half_precision_weights_does_not_vanish() -> None:
    model = mlp().half().train()
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.fill_(1e-4)  # its square is 0 in float16
    z = nn.functional.linear(model[0](X.half()), model[1].weight, model[1].bias)
    sparsify(model, WeightNoise(layers=("up",)), inputs=X.half())
    seen = []
    model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(X.half())
    assert not torch.equal(seen[0], z)
