"""Histograms of |g_f| against NumPy's, over tokens that count, with gates and whatever the φ."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actsparse.activations import ACTIVATIONS
from actsparse.observe import measure, observe
from actsparse.observe.gradient_sizes import edges
from tests.observe.test_gradient import X, losses, mlp, stages


@pytest.mark.parametrize("phi", ["relu", "jsrelu", "relu6", "gelu"])
@pytest.mark.parametrize("gated", [False, True])
def test_counts_are_those_of_the_gradient_kept_whole(phi: str, gated: bool) -> None:
    model = mlp(phi, gated)
    keep = torch.ones(X.shape[:2], dtype=torch.bool)
    keep[1, 2] = False
    with observe(model, "gradient_sizes", inputs=X, mask=keep) as seen:
        losses(model(X)).mean().backward()
    z, _, g_f = stages(model, X)
    with np.errstate(divide="ignore"):
        sizes = np.log10(g_f[keep].abs().numpy())
    active = (ACTIVATIONS[phi].derivative(z) != 0)[keep].numpy()
    summary = seen.summary("train")
    assert summary is not None
    bins = [-np.inf, *edges(), np.inf]
    for key, chosen in (("gradient_sizes", sizes), ("gradient_sizes_active", sizes[active])):
        expected = np.histogram(chosen, bins)[0]
        # an entry within rounding of an edge may lie on its other side
        assert np.abs(np.cumsum(summary[key]) - np.cumsum(expected)).max() <= 1
        assert sum(summary[key]) == chosen.size
    median = float(np.median(sizes))
    assert 10**median <= summary["gradient_median"] * (1 + 1e-9)
    assert summary["gradient_median"] <= 10 ** (median + 0.5)


def test_zeros_lie_in_the_first_bin_and_nothing_is_nothing() -> None:
    model = mlp("relu", False)
    with observe(model, "gradient_sizes", inputs=X) as seen:
        model(X)
        assert seen.summary("train") is None
        (model(X) * 0).sum().backward()
    summary = seen.summary("train")
    assert summary is not None
    assert summary["gradient_sizes"][0] == sum(summary["gradient_sizes"]) == X[..., 0].numel() * 10
    assert summary["gradient_median"] == pytest.approx(1e-12)


def test_it_is_measured_by_name() -> None:
    model = mlp("jsrelu", True)
    found = measure(model, lambda m, x: losses(m(x)).mean(), [X], "gradient_sizes", inputs=X)
    assert found.measures is not None
    assert len(found.measures["gradient_sizes"]) == len(edges()) + 1
    assert "of active" in str(found)
