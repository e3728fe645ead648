"""A function of the user's own that is called as one of ours is: it stays what it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actsparse import SwapActivation, accelerate, observe, sparsify
from actsparse.activations import ActivationFunction, named
from actsparse.blocks.site import site_of
from actsparse.modify.thresholds import calibrate_thresholds, thresholds_of
from tests.modify.dead_units import X, mlps


def tripled(z: Tensor) -> Tensor:
    return 3 * z.relu()


def slope(z: Tensor) -> Tensor:
    return 3 * (z > 0).to(z)


MINE = ActivationFunction("relu", tripled, slope, silent=True, same_zeros=True)


def test_it_takes_no_threshold_and_is_left_as_it_is() -> None:
    model = mlps("relu", "relu")
    handle = sparsify(model, SwapActivation(MINE), inputs=X)
    y = model(X)
    with observe(model, "magnitudes") as seen, torch.no_grad():
        model(X)
    with pytest.raises(ValueError, match="φ of block '0' is a function of your own, 'relu'"):
        calibrate_thresholds(model, seen, share=0.1)
    assert thresholds_of(model) is None
    assert [site_of(block).phi.new for block in handle.blocks] == [MINE, MINE]
    assert torch.equal(model(X), y)


def test_one_of_ours_comes_back_as_it_was() -> None:
    model = mlps("relu")
    handle = sparsify(model, SwapActivation("jsrelu"), inputs=X)
    y = model(X)
    with observe(model, "magnitudes") as seen, torch.no_grad():
        model(X)
    thresholds = calibrate_thresholds(model, seen, share=0.1)
    assert not torch.equal(model(X), y)
    thresholds.remove()
    assert site_of(handle.blocks[0]).phi.new is named("jsrelu")
    assert torch.equal(model(X), y)


def test_accelerated_blocks_do_not_run_the_one_of_that_name() -> None:
    model = mlps("relu")
    handle = sparsify(model, SwapActivation(MINE), inputs=X)
    assert site_of(handle.blocks[0]).function is None
    y = model(X)
    fast = accelerate(model, inputs=X)
    with torch.no_grad():
        # sums of 10 terms in float32; a plain ReLU is off by two thirds of φ
        torch.testing.assert_close(model(X), y, rtol=1e-5, atol=1e-5)
    fast.remove()
