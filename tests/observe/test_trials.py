"""Trials by name: the same rows as by hand, out of plain values, and nothing left behind."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from actsparse.observe import TRIALS, Attack, RelativeNoise, covering, measure, perturb, robustness
from actsparse.observe.gradient_pruning import pruning
from actsparse.observe.trials import disturbance_of
from tests.observe.test_measure import half_way, pair, reader, scalar, state
from tests.observe.test_robustness import Batch, net, predict

FGSM = {"disturbance": "fgsm", "size": 0.1}
NOISE = {"disturbance": "noise", "at": "d", "size": 0.2}


def look(model: nn.Module, batches: list[Batch], *args: Any, **options: Any) -> Any:
    """What ``measure`` finds in a net."""
    return measure(model, predict, batches, *args, inputs=batches[0]["x"], **options)


# --- by name as by hand -------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [None, [0, 1], [[[0.0]] * 3, [[1.0], [2.0], [3.0]]]])
def test_robustness_by_name_is_robustness_by_hand(bounds: Any) -> None:
    model, batches = net()
    plain = [
        FGSM | {"norm": "l2"},
        {"disturbance": "pgd", "size": 0.3, "steps": 3, "step_size": 0.2},
        {"disturbance": "pgd", "size": 0.3, "random_start": False},
        NOISE,
        {"disturbance": "noise", "at": "weights", "size": 0.2},
    ]
    made = [
        Attack("fgsm", 0.1, "l2"),
        Attack("pgd", 0.3, steps=3, step_size=0.2),
        Attack("pgd", 0.3, random_start=False),
        RelativeNoise("d", 0.2),
        RelativeNoise("weights", 0.2),
    ]
    tensors = None if bounds is None else (torch.tensor(bounds[0]), torch.tensor(bounds[1]))
    expected = robustness(
        model, predict, batches, made, inputs=batches[0]["x"], bounds=tensors, seed=3
    )
    for against in (plain, made, expected_rows := [each.row() for each in made]):
        options = {"robustness": {"against": against, "bounds": bounds}}
        assert look(model, batches, options, seed=3).trials == {"robustness": expected}
    assert look(model, batches, options, seed=4).trials["robustness"] != expected
    assert json.loads(json.dumps(expected_rows)) == expected_rows


def test_covering_by_name_is_covering_by_hand() -> None:
    model, batches = net()
    attack = Attack("pgd", 0.3, steps=3)
    generator = torch.Generator().manual_seed(3)
    twins = [
        perturb(model, predict, batch, attack, bounds=(0, 1), generator=generator)
        for batch in batches
    ]
    pairs, mask = (
        list(zip(batches, twins, strict=True)),
        lambda B, T: torch.arange(B * T).view(B, T) > 0,
    )
    expected = covering(model, predict, pairs, rho=0.3, inputs=batches[0]["x"], mask=mask)
    options = {"covering": {"rho": 0.3, "attack": attack.row(), "bounds": [0, 1]}}
    (rows,) = look(model, batches, options, mask=mask, seed=3).trials.values()
    assert rows == [{**attack.row(), "rho": 0.3, **row} for row in expected]
    assert rows[0]["tokens"] == 5 * 3 - 2  # the mask leaves out a batch's first
    assert look(model, batches, options, mask=mask, seed=4).trials["covering"] != rows


def test_pruning_by_name_is_pruning_by_hand() -> None:
    model, batches = net()
    expected = pruning(model, predict, batches, [0.3, 0.0], inputs=batches[0]["x"], reduction="sum")
    options = {"pruning": {"thresholds": [0.3, 0.0]}}
    assert look(model, batches, options, reduction="sum").trials == {"pruning": expected}
    assert look(model, batches, options).trials["pruning"] != expected


def test_trials_and_measures_do_not_see_each_other() -> None:
    model, batches = net()
    names = ["density", "flatness", "token_copies", "hessian"]
    alone = look(model, batches, names, labels="model", probes=3)
    both = look(model, batches, [*names, *TRIALS], labels="model", probes=3)
    assert (both.measures, both.curvature) == (alone.measures, alone.curvature)
    assert both.trials == look(model, batches, [*TRIALS]).trials
    assert alone.trials == {}


def test_trials_alone_say_on_what_they_are() -> None:
    model, batches = net()
    found = look(model, batches, "pruning")
    assert found.measures is None
    assert found.curvature == {}
    expected = look(model, batches, ["pruning", "density"])
    assert found.how == expected.how | {"measures": ["pruning"]}
    assert found.how["samples"] == 4  # one predicts nothing


@given(
    st.builds(
        Attack,
        st.just("pgd"),
        st.floats(1e-3, 1),
        st.sampled_from(["linf", "l2"]),
        steps=st.none() | st.integers(1, 20),
        step_size=st.none() | st.floats(1e-3, 1),
        random_start=st.none() | st.booleans(),
    )
    | st.builds(Attack, st.just("fgsm"), st.floats(1e-3, 1), st.sampled_from(["linf", "l2"]))
    | st.builds(RelativeNoise, st.sampled_from(["x", "d", "weights"]), st.floats(1e-3, 1))
)
def test_what_a_row_says_is_the_disturbance_again(each: Any) -> None:
    assert disturbance_of(json.loads(json.dumps(each.row()))).row() == each.row()


# --- no trace -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TRIALS])
@pytest.mark.parametrize(
    "error", [None, RuntimeError("mine"), KeyboardInterrupt()], ids=["none", "error", "interrupt"]
)
def test_nothing_is_left_behind_whatever_happens(
    name: str, error: BaseException | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = net()
    half_way(model)
    before, calls = state(model), 0

    def failing(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        torch.rand(1)
        if calls == 4 and error is not None:
            raise error
        return predict(model, batch)

    with pytest.raises(type(error)) if error else nullcontext():
        measure(model, failing, batches, name, inputs=batches[0]["x"])
    assert state(model) == before
    assert calls >= 4


def test_a_loader_draws_its_order_and_leaves_random_numbers_as_they_were() -> None:
    model, batches = net()
    rows = [
        {"x": x, "y": y}
        for batch in batches
        for x, y in zip(batch["x"], batch["y"], strict=True)
        if (y >= 0).any()
    ]
    loader: Any = DataLoader(rows, batch_size=3, shuffle=True)  # type: ignore[arg-type]
    before = state(model)
    found = [measure(model, predict, loader, [*TRIALS], inputs=batches[0]["x"]) for _ in range(2)]
    assert state(model) == before
    assert found[0] == found[1]


def test_progress_ends_at_its_total() -> None:
    model, batches = net()
    told: dict[str, list[tuple[int, int]]] = {}

    def progress(name: str, done: int, total: int) -> None:
        told.setdefault(name, []).append((done, total))

    options = {
        "robustness": {"against": [FGSM, {"disturbance": "pgd", "size": 0.1, "steps": 3}, NOISE]},
        "covering": {},
        "pruning": {"thresholds": [0.0, 0.1, 0.1, 1.0]},
    }
    look(model, batches, options, progress=progress)
    totals = {"robustness": 2 * (1 + 2 + 4 + 1), "covering": 2 * 3, "pruning": 2 * 3}
    assert {name: steps[-1] for name, steps in told.items()} == {
        name: (total, total) for name, total in totals.items()
    }
    assert all(steps == sorted(steps) for steps in told.values())


# --- what cannot be -----------------------------------------------------------------------------


def test_token_ids_take_noise_and_no_attack() -> None:
    model, batches = reader()
    noise = {"robustness": {"against": [NOISE]}}
    rows = measure(model, pair, batches, noise, inputs=batches[0][0]).trials["robustness"]
    assert [row["samples"] for row in rows] == [3, 3]
    assert rows[0]["loss"] != rows[1]["loss"]
    for name in ("robustness", "covering"):
        told: list[str] = []
        with pytest.raises(ValueError, match=r"token ids cannot be moved by a gradient.*use noise"):
            measure(
                model, pair, batches, ["flatness", name], inputs=batches[0][0],
                progress=lambda name, done, total: told.append(name),  # noqa: B023
            )  # fmt: skip
        assert "passes" not in told  # nothing that would be lost


def test_accuracy_needs_logits_and_a_gradient_does_not() -> None:
    model, [batch, _] = reader()
    for name in ("robustness", "covering"):
        with pytest.raises(ValueError, match=f"{name} needs logits: loss_fn on batch 0 must"):
            measure(model, scalar, [batch], name, inputs=batch[0])
    (rows,) = measure(model, scalar, [batch], "pruning", inputs=batch[0]).trials.values()
    expected = measure(model, pair, [batch], "pruning", inputs=batch[0]).trials["pruning"]
    assert [row["kept"] for row in rows] == [row["kept"] for row in expected]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("robustness", {"size": 0.1}, "robustness has no option 'size'; known: against, bounds"),
        ("covering", {"seed": 1}, "covering has no option 'seed'; known: rho, filtered, share"),
        ("pruning", {"threshold": 1}, "pruning has no option 'threshold'; known: thresholds"),
        ("robustness", {"against": []}, r"robustness: against=\[\]: expected a list of disturb"),
        ("robustness", {"against": FGSM}, "against={.*}: expected a list"),
        ("robustness", {"against": ["fgsm"]}, "'fgsm' is no disturbance; expected {'disturbance'"),
        ("robustness", {"against": [{"size": 1}]}, "is no disturbance; expected {'disturbance'"),
        ("robustness", {"against": [FGSM | {"steps": 3}]}, "takes no steps, step_size or random"),
        ("robustness", {"against": [FGSM | {"at": "x"}]}, "fgsm has no option 'at'; known: size"),
        ("robustness", {"against": [FGSM | {"size": "1"}]}, "fgsm has size='1': expected a finite"),
        ("robustness", {"against": [FGSM | {"size": -1}]}, "epsilon=-1.*a finite number > 0"),
        ("robustness", {"against": [NOISE | {"at": "z"}]}, "at='z'.*expected 'x', 'd' or 'weight"),
        ("robustness", {"against": [{"disturbance": "noise", "size": 1}]}, "noise lacks 'at', in"),
        ("robustness", {"against": [{"disturbance": "pgd"}]}, "pgd lacks 'size', in {'disturbance"),
        ("robustness", {"bounds": 1}, r"robustness: bounds=1: expected \[low, high\], numbers or"),
        ("robustness", {"bounds": [1, 0]}, r"bounds=\[1, 0\]: expected \[low, high\]"),
        ("covering", {"bounds": [0, "1"]}, r"bounds=\[0, '1'\]: expected \[low, high\]"),
        ("covering", {"bounds": [[0, 0], [1, 1, 1]]}, r"bounds=\[\[0, 0\].*: expected \[low, high"),
        ("covering", {"attack": NOISE}, "covering: attack={.*}: expected fgsm or pgd, not noise"),
        ("covering", {"rho": 0}, "covering: rho=0: expected a finite number > 0"),
        ("pruning", {"thresholds": 0.1}, "thresholds=0.1: expected a list of a finite number"),
        ("pruning", {"thresholds": [-0.1]}, r"pruning: thresholds=\[-0.1\]: expected a list"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_any_work(
    name: str, options: dict[str, Any], said: str
) -> None:
    model, batches = net()

    def never(model: nn.Module, batch: Batch) -> Any:
        raise AssertionError("work has begun")

    with pytest.raises(ValueError, match=said):
        measure(model, never, batches, {"density": {}, name: options}, inputs=batches[0]["x"])


def test_clean_inputs_outside_the_bounds_are_refused() -> None:
    model, batches = net()
    for name in ("robustness", "covering"):
        with pytest.raises(ValueError, match="the clean inputs are outside bounds"):
            look(model, batches, {name: {"bounds": [0.2, 0.3]}})


def test_it_prints_tables_and_is_plain_values() -> None:
    model, batches = net()
    found = look(model, batches, [*TRIALS])
    printed = str(found)
    for word in (
        "robustness",
        "clean",
        "weights",
        "covering",
        "second",
        "r99",
        "pruning",
        "cosine",
    ):
        assert word in printed
    plain = found.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert [row["disturbance"] for row in plain["trials"]["robustness"]] == [
        "clean", "fgsm", "pgd", "noise", "noise", "noise",
    ]  # fmt: skip
