"""Slim forms of a trained model: what was cut was dead, what was dropped was affordable."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from actsparse import handle_of, load, save
from actsparse.cli.main import app
from actsparse_lab.campaigns.slim import BUDGET, FORMS, rounding, slim
from actsparse_lab.engine.run import run
from actsparse_lab.engine.tasks import task_of
from actsparse_lab.records import Run, read_run, run_path
from actsparse_lab.tasks import run_config

KILLED = 40  # of the 192 hidden units of either block
QUICK: dict[str, Any] = {"steps": 4, "log_every": 4, "eval_every": 4, "batch_size": 32}


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def weights(of: Run) -> Path:
    return of.path.parent / "weights"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Short runs on digits; in vanilla's weights `KILLED` units of each block are dead."""
    out = tmp_path_factory.mktemp("slim")
    done = {
        arm: run(run_config("digits", arm, 0, **QUICK), out)
        for arm in ("vanilla", "top-k", "no-mlp")
    }
    model = load(weights(done["vanilla"]))
    handle = handle_of(model)
    assert handle is not None
    with torch.no_grad():
        for block in handle.blocks:
            assert block.up.bias is not None
            block.up.bias[:KILLED] = -99.0
    save(model, weights(done["vanilla"]))
    return done


Slim = tuple[dict[str, Any], nn.Module, dict[str, nn.Module]]


@pytest.fixture(scope="module")
def vanilla(runs: dict[str, Run]) -> Slim:
    """The row of vanilla, the model it was made of, and its forms."""
    model = load(weights(runs["vanilla"]))
    forms: dict[str, nn.Module] = {}

    def timed(models: dict[str, nn.Module], infer: Callable[[nn.Module], object]) -> Any:
        forms.update(models)
        return {"ran": [infer(each) for each in models.values()] and [*models]}

    return slim(model, runs["vanilla"], timed=timed), model, forms


@torch.no_grad()
def active(model: nn.Module, of: Run, split: str) -> list[Tensor]:
    """Of each block: which units are active at which token of a split, bool [tokens, H]."""
    rows = getattr(task_of(of.task).splits(run_config("digits", of.arm, 0, **QUICK)), split)
    found: list[list[Tensor]] = []
    hooks = []
    handle = handle_of(model)
    assert handle is not None
    for block in handle.blocks:
        own: list[Tensor] = []
        found.append(own)
        keep = lambda module, args, z, own=own: own.append(z > 0)  # noqa: E731
        hooks.append(block.up.module.register_forward_hook(keep))
    for at in range(len(rows)):
        model(pixel_values=rows[at]["pixel_values"][None])
    for hook in hooks:
        hook.remove()
    return [torch.cat(own).flatten(0, -2) for own in found]


def test_what_is_cut_was_dead_on_validation_rows(vanilla: Slim, runs: dict[str, Run]) -> None:
    row, _, forms = vanilla
    trained = active(forms["trained"], runs["vanilla"], "validation")
    dead = sum(int((~each.any(0)).sum()) for each in trained)
    assert row["prune"]["units"] == 2 * 192
    assert row["prune"]["cut"] == dead >= 2 * KILLED
    assert {name: form["units"] for name, form in row["forms"].items()} == {
        "trained": 384, "pruned": 384 - dead, "thresholds": 384, "both": 384 - dead,
    }  # fmt: skip
    # a unit has D weights and a bias in up, and D weights in down
    for part in ("model", "mlps"):
        sizes = [row["forms"][name]["parameters"][part] for name in ("trained", "pruned")]
        assert sizes[0] - sizes[1] == dead * (48 + 1 + 48)
    assert row["forms"]["trained"]["parameters"]["mlps"] == 2 * (2 * 48 * 192 + 192 + 48)
    # four bytes each in the file; what else is in the folder is text of a few hundred
    saved = row["forms"]["trained"]["bytes"] - row["forms"]["pruned"]["bytes"]
    assert abs(saved - 4 * dead * (48 + 1 + 48)) < 500


def test_pruning_moves_logits_no_more_than_float32_is_off(vanilla: Slim) -> None:
    found = vanilla[0]["prune"]
    assert found["trained_off"] > 0
    # differences of float32 numbers are exact in float64, and those from float64's own logits are
    # rounded by 2⁻⁵³ of the logit
    slack = 4 * 2**-53 * found["logit"]
    assert found["moved"] <= found["trained_off"] + found["pruned_off"] + slack


def test_scores_are_the_forms_own(vanilla: Slim, runs: dict[str, Run]) -> None:
    row, _, forms = vanilla
    assert tuple(row["forms"]) == tuple(forms) == FORMS
    assert row["speed"] == {"ran": [*FORMS]}
    assert row["rows"] == {"validation": 300, "test": 300, "timed": 32}
    config = run_config("digits", "vanilla", 0, **QUICK)
    test = task_of("digits").splits(config).test
    images = torch.stack([test[at]["pixel_values"] for at in range(len(test))])
    labels = torch.tensor([int(test[at]["labels"]) for at in range(len(test))])
    for name, model in forms.items():
        with torch.no_grad():
            logits = model(pixel_values=images).logits
        # means of 300 losses, each off by float32's rounding of logits of order 1
        loss = float(nn.functional.cross_entropy(logits.double(), labels))
        assert row["forms"][name]["loss"] == pytest.approx(loss, rel=1e-5)
        right = float((logits.argmax(-1) == labels).double().mean())
        assert row["forms"][name]["quality"] == pytest.approx(right, abs=1e-9)


def test_active_units_are_density_by_tokens(vanilla: Slim, runs: dict[str, Run]) -> None:
    row, _, forms = vanilla
    blocks = active(forms["trained"], runs["vanilla"], "test")
    each = torch.cat([block.sum(1) for block in blocks]).double()
    found = row["forms"]["trained"]
    # one image at a time or 32: a z within rounding of zero may change its sign, hence 1 in 10⁴
    assert found["active"] == pytest.approx(float(each.mean()), rel=1e-4)
    assert found["density"] == pytest.approx(found["active"] / 192)
    assert row["forms"]["both"]["active"] <= row["forms"]["thresholds"]["active"] * (1 + 1e-4)
    assert row["forms"]["thresholds"]["active"] < found["active"]


def test_thresholds_keep_to_the_budget(vanilla: Slim) -> None:
    found = vanilla[0]["thresholds"]
    assert found["budget"] == pytest.approx(BUDGET * found["loss_before"], rel=1e-6)
    assert found["loss_after"] <= found["loss_before"] + found["budget"]
    assert found["share"] > 0
    assert all(block["threshold"] > 0 for block in found["blocks"])


def test_the_model_is_as_before(vanilla: Slim, runs: dict[str, Run]) -> None:
    _, model, forms = vanilla
    fresh = load(weights(runs["vanilla"])).state_dict()
    assert fresh.keys() == model.state_dict().keys()
    assert all(fresh[name].equal(value) for name, value in model.state_dict().items())
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert model(pixel_values=x).logits.equal(forms["trained"](pixel_values=x).logits)
        # as is timed: a copy keeps widths and thresholds
        twin = copy.deepcopy(forms["both"])
        assert twin(pixel_values=x).logits.equal(forms["both"](pixel_values=x).logits)


def test_a_form_that_cannot_be_is_left_out_and_says_why(runs: dict[str, Run]) -> None:
    row = slim(load(weights(runs["top-k"])), runs["top-k"], timed=lambda models, infer: {})
    assert "thresholds" not in row["forms"]
    assert "both" not in row["forms"]
    assert row["thresholds"] is None
    assert "takes no threshold" in row["refused"]["thresholds"]


def test_other_runs_are_refused(runs: dict[str, Run]) -> None:
    own = runs["vanilla"]
    model = load(weights(own))

    def refused(changed: Run, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            slim(model, changed, timed=lambda models, infer: {})

    refused(dataclasses.replace(own, result=None), "has no result: the run is not finished")
    other = {**own.header, "data_sha256": "0" * 64}
    refused(dataclasses.replace(own, header=other), "the data of digits have changed since")
    old = {**own.header, "config": {**own.header["config"], "magic": 1}}
    refused(dataclasses.replace(own, header=old), "has the config of another actsparse")


# -- rounding ----------------------------------------------------------------------------------


def test_rounding_tells_a_dead_unit_from_a_living_one() -> None:
    d, h, out, tokens = 16, 64, 4, 200
    up, down = nn.Linear(d, h), nn.Linear(h, out)
    nn.init.constant_(up.bias[:20], -99.0)
    mlp = nn.Sequential(up, nn.ReLU(), down)
    exact = copy.deepcopy(mlp).double()

    def without(first: int) -> nn.Sequential:
        short = nn.Sequential(nn.Linear(d, h - first), nn.ReLU(), nn.Linear(h - first, out))
        values = [up.weight[first:], up.bias[first:], down.weight[:, first:], down.bias]
        with torch.no_grad():
            for parameter, value in zip(short.parameters(), values, strict=True):
                parameter.copy_(value)
        return short

    def model(of: nn.Module) -> Any:
        return lambda x: SimpleNamespace(logits=of(x))

    x = torch.randn(tokens, d)
    batches = [{"x": x[:150]}, {"x": x[150:]}]
    found = rounding(model(mlp), model(without(20)), model(exact), batches)
    # A sum of n products, in any order, is off by at most γ_n = n u / (1 − n u) of the sum of their
    # absolute values, u = 2⁻²⁴ (Higham, Accuracy and Stability, §3.1); here n = D + 1, then H + 1.
    u = 2.0**-24
    with torch.no_grad():
        off_z = (d + 1) * u * (x.abs() @ up.weight.abs().T + up.bias.abs()).double()
        sizes = (h + 1) * u * mlp[:2](x).double() + off_z
        bound = sizes @ down.weight.abs().T.double() + (h + 1) * u * down.bias.abs().double()
    most = 1.01 * float(bound.max())  # 1.01: terms in u², and 1 − n u
    assert 0 < found["trained_off"] <= most
    assert 0 < found["pruned_off"] <= most
    assert found["moved"] <= found["trained_off"] + found["pruned_off"] + 1e-15
    with torch.no_grad():
        assert found["logit"] == float(mlp(x[:150]).abs().max().maximum(mlp(x[150:]).abs().max()))
    wrong = rounding(model(mlp), model(without(21)), model(exact), batches)
    assert wrong["moved"] > 2 * most
    assert wrong["trained_off"] == found["trained_off"]


# -- as a user types it ------------------------------------------------------------------------


def test_the_command_writes_a_row_for_each_run_that_can_be(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    unfinished = run_path(tmp_path, "paper", 3)
    shutil.copytree(runs["vanilla"].path.parent, unfinished.parent)
    lines = [*runs["vanilla"].path.read_text().splitlines()]
    unfinished.write_text("".join(f"{line}\n" for line in lines if '"kind": "result"' not in line))
    bare = run_path(tmp_path, "vanilla", 1)
    bare.parent.mkdir(parents=True)
    shutil.copy(runs["vanilla"].path, bare)
    out = tmp_path / "slim.json"
    folders = [runs["vanilla"].path.parent, runs["no-mlp"].path.parent, unfinished.parent]
    done = call("bench", "slim", *folders, bare.parent, "--rounds", "1", "--out", out, "--json")
    assert done.exit_code == 0, done.output
    told = "".join(done.stderr.split())  # lines are broken where the terminal ends
    assert "recipe'no-mlp'leavestheMLPsout" in told
    assert "hasnoresult,therunisnotfinished" in told
    assert "hasnoweights/" in told
    record = json.loads(done.stdout)
    assert record == json.loads(out.read_text())
    assert (record["benchmark"], record["budget"], record["threads"]) == ("slim", BUDGET, 1)
    assert record.keys() >= {"hardware", "versions", "git"}
    (row,) = record["runs"]
    assert (row["task"], row["arm"], row["seed"]) == ("digits", "vanilla", 0)
    result = read_run(runs["vanilla"].path).result
    assert result is not None
    assert row["quality_name"] == result["quality_name"]
    speed = row["speed"]
    assert [each["to"] for each in speed["ratios"]] == [
        "pruned", "trained, accelerated", "both, accelerated",
    ]  # fmt: skip
    assert all(each["of"] == "trained" and each["value"] > 0 for each in speed["ratios"])
    assert speed["ran"].keys() == {"trained", "both"}
    assert all("blocks dense: too small: " in ran for ran in speed["ran"].values())


def test_the_command_says_what_would_be_right(runs: dict[str, Run]) -> None:
    done = call("bench", "slim", runs["no-mlp"].path.parent)
    assert done.exit_code == 2
    assert "none of these runs can be made slim" in done.stderr
    done = call("bench", "slim", weights(runs["vanilla"]))
    assert done.exit_code == 2
    assert "holds no record.jsonl: give the folder of a run" in done.stderr
