"""docs/training.md says what the records and the program say, and its example runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from actsparse_lab.cli.options import chosen
from actsparse_lab.records import read_runs
from actsparse_lab.report import compare, markdown_table
from actsparse_lab.tasks import TASK_SETTINGS, arm_named, run_config
from tests.test_docs import parsed

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
TABLES = dict(re.findall(r"<!-- records: (\S+) -->\n(.*?)<!-- end of records -->", TEXT, re.DOTALL))
COMMANDS = re.findall(r"^    (?:torchrun .* -m )?(actsparse (?:train|compare) .*)$", TEXT, re.M)


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_are_the_records(name: str) -> None:
    runs = read_runs(ROOT / "benchmarks" / name)
    assert TABLES[name].strip() == markdown_table(compare(runs)).strip()


def test_the_page_says_what_finetuning_gave() -> None:
    said = " ".join(TEXT.split())
    numbers = []
    for name in ("finetune-lm-gelu-from-vanilla", "finetune-lm-gelu-from-vanilla-no-1d-decay"):
        table = compare(read_runs(ROOT / "benchmarks" / name))
        arms = [table.arm(f"{arm}-finetune") for arm in ("relu", "paper", "hoyer")]
        numbers.append([f"{arm.inference_density.mean:.2f}" for arm in arms])  # type: ignore[union-attr]
        if "no-1d" not in name:
            assert all(arm is not None and arm.verdict == "better" for arm in arms)
    one, two, three = numbers[0]
    assert f"ends at {one} by mixing ReLU in, {two} with the papers' recipe, {three} with" in said
    one, two, three = numbers[1]
    assert f"biases, these three end at {one}, {two} and {three}:" in said


def test_peak_memory_is_the_records() -> None:
    rows = []
    for name in ("vit-imagenet-1", "vit-imagenet-2", "t5-c4-1", "t5-c4-2"):
        (run,) = read_runs(ROOT / "benchmarks" / "scale" / name)
        assert run.result is not None
        assert run.result["step"] == 3
        peak = run.result["time"]["peak_memory_mib"]
        rows.append(f"| {run.task} | {run.header['processes']} | {peak:.0f} |")
    assert "\n".join(rows) in TEXT


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "training.md", "exec"), names)
    assert type(names["plain"]).__name__ == "ViTForImageClassification"
    assert "zeroth_bias" in " ".join(name for name, _ in names["again"].named_parameters())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_parse_and_name_what_exists(command: str) -> None:
    _, options = parsed(command)
    own = {name: options[name] for name in ("quick", "data", "steps", "given")}
    overrides, _ = chosen(options["task"], file=options["config"], whose=options["settings"], **own)
    assert run_config(options["task"], options.get("arm") or "vanilla", 0, **overrides).task
    assert len(COMMANDS) >= 3


def test_every_task_and_arm_of_finetuning_is_on_the_page() -> None:
    words = set(re.findall(r"`([^`\n]+)`", TEXT))
    assert set(TASK_SETTINGS) - words == set()
    for arm in re.findall(r"`([a-z0-9-]+-finetune)`", TEXT):
        assert arm_named(arm)
