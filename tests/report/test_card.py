"""The card of a trained model says what its record says."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from huggingface_hub import ModelCard

import actsparse
from actsparse.modify import Recipe
from actsparse_lab.records import RecordError, RecordWriter, Run, environment, read_run
from actsparse_lab.report import model_card

RECORDS = Path(__file__).parents[2] / "benchmarks"
PAPER = read_run(RECORDS / "digits" / "runs" / "paper-seed0" / "record.jsonl")


def again(path: Path, **changed: Any) -> Run:
    """The paper arm's run, with a result and a header changed as told."""
    config = PAPER.header["config"] | changed.pop("config", {})
    header = {"task": "digits", "arm": "paper", "seed": 3, "config": config, **environment()}
    header |= {"processes": 2, "command": "actsparse --out /home/me"}
    with RecordWriter(path, header) as record:
        record.write(**{**(PAPER.result or {}), **changed})
    return read_run(path)


def rows(card: str, first: str) -> list[list[str]]:
    """The cells of the table whose first head is ``first``, from the second row on."""
    (table,) = re.findall(rf"^\| {first} \|.*\n\| ---.*\n((?:\|.*\n)+)", card, re.MULTILINE)
    return [line.strip("| ").split(" | ") for line in table.splitlines()]


def test_the_hub_reads_its_metadata() -> None:
    data = ModelCard(model_card(PAPER)).data
    assert data.library_name == "actsparse"
    assert data.tags == ["activation-sparsity"]
    assert data.license is None


def test_the_table_is_the_record() -> None:
    result = PAPER.result
    assert result is not None
    inference, training = result["inference"], result["training"]
    found = rows(model_card(PAPER), "block")
    pairs = [(inference, training), *zip(inference["blocks"], training["blocks"], strict=True)]
    assert [row[0] for row in found[1:]] == [f"`{row['block']}`" for row in inference["blocks"]]
    for row, (now, then) in zip(found, pairs, strict=True):
        densities = [now["density"], then["density"], then["derivative_density"]]
        for cell, density in zip(row[1:5], [*densities, now["living_density"]], strict=True):
            # shown with one digit of percent
            assert float(cell.removesuffix(" %")) == pytest.approx(100 * (1 - density), abs=0.0501)
        assert row[5] == f"{now['dead']} of {now['units']}"
    assert "| as it is | 99.33 % | 0.0457 |" in model_card(PAPER)
    assert "## Quality on the test split of digits" in model_card(PAPER)


def test_the_recipe_can_be_made_from_the_card() -> None:
    made = []
    for call in re.findall(r"^- `(\w+\(.*\))`$", model_card(PAPER), re.MULTILINE):
        node = ast.parse(call, mode="eval").body
        assert isinstance(node, ast.Call)
        options = {each.arg: ast.literal_eval(each.value) for each in node.keywords}
        made.append({"modification": ast.unparse(node.func), **options})
    recipe = Recipe.from_json(
        PAPER.header["config"]["recipe"]
    )  # of a record that lacks new options
    assert Recipe.from_json({"name": "paper", "modifications": made}) == recipe


def test_options_that_no_longer_exist_are_not_in_the_card(tmp_path: Path) -> None:
    change = {"modification": "ActivationPenalty", "kind": "l1", "weight": 1.0, "release": None}
    recipe = {"name": "old", "modifications": [change]}
    run = again(tmp_path / "record.jsonl", config={"recipe": recipe})
    assert "- `ActivationPenalty(kind='l1', weight=1.0)`" in model_card(run)


def test_where_finetuning_began_is_told_without_naming_the_machine(tmp_path: Path) -> None:
    before = {"loss": 0.5, "quality": 0.9, "inference": (PAPER.result or {})["training"]}
    start = "/home/me/runs/vanilla-seed3/weights"
    run = again(tmp_path / "record.jsonl", config={"start": start}, before=before)
    card = model_card(run)
    assert "A model finetuned from `vanilla-seed3/weights` on digits" in card
    assert rows(card, "") == [
        ["as it is", "99.33 %", "0.0457", "80.7 %"],
        ["before finetuning", "90.00 %", "0.5000", "80.6 %"],
    ]
    assert "/home/me" not in card
    assert "processes: 2" in card
    hub = again(tmp_path / "hub.jsonl", config={"start": "google/vit-base"}, before=before)
    assert "finetuned from `google/vit-base` on" in model_card(hub)


def test_what_cannot_be_told_is_not(tmp_path: Path) -> None:
    inference = dict((PAPER.result or {})["inference"])
    inference |= {"dead": inference["units"], "living_density": None}
    run = again(tmp_path / "record.jsonl", inference=inference, training=None)
    (whole, *_) = rows(model_card(run), "block")
    assert whole[2:] == ["–", "–", "–", "384 of 384"]


@pytest.mark.parametrize("task", ["lm", "text"])
def test_a_model_without_mlps_has_no_table(task: str) -> None:
    card = model_card(read_run(RECORDS / task / "runs" / "no-mlp-seed0" / "record.jsonl"))
    assert "the model runs without its MLP blocks" in card
    assert "(less is better)" in card
    assert "| block |" not in card


def test_an_unfinished_run_has_no_card(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    with RecordWriter(path, PAPER.header) as record:
        record.write("failed", step=3, reason="the loss became NaN")
    with pytest.raises(RecordError, match=r"record\.jsonl: there is no result yet"):
        model_card(read_run(path))


def test_its_code_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    load = create_autospec(actsparse.load)
    monkeypatch.setattr(actsparse, "load", load)
    (code,) = re.findall(r"```python\n(.*?)```", model_card(PAPER), re.DOTALL)
    exec(code, {})
    load.assert_called_once_with("weights")
