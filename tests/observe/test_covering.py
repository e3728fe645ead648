"""Covering by brute force, from W and what plain hooks read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actsparse import ZerothBias, find_mlp_blocks, sparsify
from actsparse.observe.attack import Attack, perturb
from actsparse.observe.coverage import covering
from actsparse.observe.measuring import checked_options
from tests.observe.brute import D, H
from tests.observe.test_curvature_models import gpt2
from tests.observe.test_robustness import Batch, T, net, predict


def brute(
    model: nn.Module, blocks: list[Any], pair: tuple[Any, Any], how: Any, keep: Tensor
) -> Any:
    """(block, layer) → r_t of tokens kept, from W and what plain hooks read."""
    layers = {
        (i, role): getattr(block, role)
        for i, block in enumerate(blocks)
        for role in ("up", "gate", "down")
        if getattr(block, role) is not None
    }
    inputs: list[dict[Any, Tensor]] = []
    hooks = [
        layer.module.register_forward_hook(
            lambda module, args, out, at=at: inputs[-1].update({at: args[0].detach()})
        )
        for at, layer in layers.items()
    ]
    for batch in pair:
        inputs.append({})
        how(model.eval(), batch)
    for hook in hooks:
        hook.remove()
    found: dict[Any, list[float]] = {}
    for at, layer in layers.items():
        weight, ratios = layer.weight.detach(), []
        for b, t in keep.nonzero().tolist():
            x, delta = inputs[0][at][b, t], inputs[1][at][b, t] - inputs[0][at][b, t]
            noise = 0.1 * weight.square().mean().sqrt() * x.norm() * len(weight) ** 0.5
            ratios.append(float((weight @ delta).norm() / noise) if delta.any() else 0.0)
        found[at] = sorted(ratios)
    return found


def same_rows(rows: list[dict[str, Any]], expected: dict[Any, list[float]]) -> bool:
    def told(ratios: list[float]) -> dict[str, Any]:
        n = len(ratios)
        at = {
            f"r{q}": next(r for i, r in enumerate(ratios, 1) if 100 * i >= q * n)
            for q in (50, 90, 99)
        }
        return {"tokens": n, "covered": sum(r <= 1 for r in ratios) / n, **at}

    return len(rows) == len(expected) and all(
        row["layer"] == role
        and {key: row[key] for key in told(ratios)} == pytest.approx(told(ratios), rel=1e-9)
        for row, ((_, role), ratios) in zip(rows, expected.items(), strict=True)
    )


@pytest.mark.parametrize("modified", [False, True])
def test_covering_agrees_with_brute_force(modified: bool) -> None:
    model, batches = net(gated=True)
    blocks = find_mlp_blocks(model, batches[0]["x"])
    if modified:
        sparsify(model, ZerothBias(finetune=True), blocks=blocks)
        for name, parameter in model.named_parameters():
            if name.endswith("zeroth_bias"):
                parameter.data.normal_()
    pairs = [(b, perturb(model, predict, b, Attack("pgd", 0.05))) for b in batches]
    rows = covering(model, predict, pairs, blocks=blocks)
    parts = [
        brute(model, blocks, pair, predict, torch.ones(len(pair[0]["x"]), T)) for pair in pairs
    ]
    expected = {at: sorted(parts[0][at] + parts[1][at]) for at in parts[0]}
    # r_t is of changes ≥ 1e-4 of outputs ≤ 100, each of some 10 products: 1e7 roundings, and 1e-9
    # is as many
    assert same_rows(rows, expected)
    assert [row["block"] for row in rows] == ["first"] * 2 + ["second"] * 3
    assert any(0 < row["covered"] < 1 for row in rows)
    half = covering(model, predict, pairs, rho=0.05, blocks=blocks)
    assert [row["r90"] for row in half] == pytest.approx([2 * row["r90"] for row in rows])


def test_padding_is_left_out_and_embeddings_can_be_attacked() -> None:
    model, given = gpt2("eager")
    keep = given["attention_mask"] == 1
    batch = {
        "inputs_embeds": torch.randn(2, 6, 8).double(),
        "attention_mask": given["attention_mask"],
    }

    def how(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return model(**batch).logits[:, :-1], given["labels"][:, 1:]

    pair = (batch, perturb(model, how, batch, Attack("fgsm", 0.1)))
    blocks = find_mlp_blocks(model, batch)
    assert same_rows(
        covering(model, how, [pair], blocks=blocks), brute(model, blocks, pair, how, keep)
    )
    masked = covering(model, how, [pair], blocks=blocks, mask=keep & (torch.arange(6) > 0))
    assert {row["tokens"] for row in masked} == {int(keep.sum()) - 2}


def test_covering_of_no_change_and_of_no_input() -> None:
    mlp = nn.Sequential(nn.Linear(D, H, bias=False), nn.ReLU(), nn.Linear(H, D))
    clean = torch.tensor([[1.0], [0.0], [0.0], [0.0]]).expand(4, D)
    moved = clean + torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    up, _ = covering(mlp, lambda model, x: model(x), [(clean, moved)], inputs=clean)
    assert (up["covered"], up["r50"], up["r90"]) == (0.5, 0.0, None)


def test_pairs_that_are_no_pairs_are_refused() -> None:
    model, batches = net()
    cases: list[tuple[Any, str]] = [([], "no token"), ([tuple(batches)], "different shapes")]
    for pairs, message in cases:
        with pytest.raises(ValueError, match=message):
            covering(model, predict, pairs, inputs=batches[0]["x"])


def test_rho_must_be_positive_and_finite() -> None:
    for rho in (0.0, float("inf")):
        with pytest.raises(ValueError, match=f"rho={rho}"):
            covering(nn.Linear(3, 2), predict, [], rho=rho)


@pytest.mark.parametrize("filtered", ["rows", "columns"])
@pytest.mark.parametrize("share", [0.5, 0.95, 1.0])
def test_a_filter_leaves_what_the_leading_singular_vectors_of_the_clean_input_span(
    filtered: Any, share: float
) -> None:
    mlp = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)).double()
    clean = torch.randn(3, 4, D, dtype=torch.float64) * torch.logspace(0, -3, D)
    attacked = clean + 0.01 * torch.randn_like(clean)
    rows = covering(
        mlp, lambda model, x: model(x), [(clean, attacked)], inputs=clean,
        filtered=filtered, share=share,
    )  # fmt: skip
    weight, ratios = mlp[0].weight.detach(), []
    for x, moved in zip(clean, attacked, strict=True):  # a sample [T, D] after the other
        left, sizes, right = torch.linalg.svd(x)
        count = next(
            k
            for k in range(1, 5)
            if sizes[:k].square().sum() >= share * sizes.square().sum() - 1e-15
        )
        delta = moved - x
        if filtered == "rows":
            change = left[:, :count] @ left[:, :count].T @ delta @ weight.T
        else:
            change = delta @ right[:count].T @ right[:count] @ weight.T
        noise = 0.1 * weight.square().mean().sqrt() * x.norm(dim=-1) * H**0.5
        ratios += (change.norm(dim=-1) / noise).tolist()
    assert [rows[0]["r50"], rows[0]["r99"]] == pytest.approx(
        [sorted(ratios)[5], max(ratios)], rel=1e-9
    )


@pytest.mark.parametrize("options", [{"filtered": "cols"}, {"share": 0.0}, {"share": 1.5}])
def test_a_wrong_filter_is_named(options: dict[str, Any]) -> None:
    x = torch.randn(2, D)
    mlp = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        covering(mlp, lambda model, x: model(x), [(x, x)], inputs=x, **options)
    with pytest.raises(ValueError, match=f"{name}="):
        checked_options({"covering": options})
