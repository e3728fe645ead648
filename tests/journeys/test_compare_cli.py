"""The main journey, as a user types it: compare, stop, go on, look."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actsparse.cli.main import app


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "actsparse.cli.main", *words]


def records(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in out.glob("runs/*/record.jsonl")}


@pytest.mark.slow
def test_compare_stopped_and_called_again_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    words = ["compare", "--arms", "vanilla,paper", "--seeds", "2", "--steps", "120"]
    words += [
        "--set",
        "batch_size=8",
        "--set",
        "log_every=20",
        "--set",
        "eval_every=40",
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not any(b'"result"' in each for each in records(tmp_path).values()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "to go on: actsparse compare --arms vanilla,paper" in errors
    before = {name: each for name, each in records(tmp_path).items() if b'"result"' in each}
    assert 1 <= len(before) < 4
    assert not (tmp_path / "report.html").exists()

    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "[4/4]" in done.stdout
    assert done.stdout.count("done before") == len(before)
    assert f"page: {tmp_path / 'report.html'}" in done.stdout
    assert "vanilla" in (tmp_path / "report.html").read_text()
    after = records(tmp_path)
    assert set(after) == {f"{arm}-seed{seed}" for arm in ("vanilla", "paper") for seed in (0, 1)}
    assert {name: after[name] for name in before} == before

    again = CliRunner().invoke(app, [*words, "--json"])
    assert again.exit_code == 0
    arms = {arm["name"]: arm for arm in json.loads(again.stdout)["arms"]}
    assert arms["paper"]["seeds"] == [0, 1]
    assert again.stderr.count("done before") == 4
    assert records(tmp_path) == after

    other = CliRunner().invoke(app, [*words, "--set", "lr=0.1"])
    assert other.exit_code == 2
    assert "lr=0.005 (now 0.1)" in other.stderr


def test_train_that_blows_up_says_so_and_exits_with_1(tmp_path: Path) -> None:
    words = ["train", "--arm", "vanilla", "--steps", "20"]
    words += ["--set", "eval_every=1", "--set", "lr=1e30"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "Failed: stopped after" in done.stderr
    lines = records(tmp_path)["vanilla-seed0"].splitlines()
    assert json.loads(lines[-1])["kind"] == "failed"
    assert (tmp_path / "runs" / "vanilla-seed0" / "weights" / "model.safetensors").exists()


def test_train_accelerated_says_how_each_block_ran(tmp_path: Path) -> None:
    file = tmp_path / "short.toml"
    file.write_text("log_every = 3\neval_every = 3\nbatch_size = 16\n")
    words = ["train", "--steps", "6", "--config", str(file), "--set", "batch_size=8"]
    words += ["--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*words, "--set", "accelerate=true"])
    assert done.exit_code == 0, done.output
    for block in ("beit.layers.0.mlp", "beit.layers.1.mlp"):
        assert done.stdout.count(f"{block}: ") == 1
    (record,) = records(tmp_path).values()
    header, *_, result = (json.loads(line) for line in record.splitlines())
    assert header["config"]["accelerate"] is True
    assert all(line in done.stdout for line in result["time"]["accelerated"])
    other = CliRunner().invoke(app, words)
    assert other.exit_code == 2
    assert "accelerate=True (now False)" in other.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "--task", "dogs"], "unknown task 'dogs'; known: digits, text, lm"),
        (["compare", "--arms", "vanila"], "unknown arm 'vanila'; known: vanilla, paper"),
        (["train", "--set", "hidden_size"], "--set 'hidden_size': expected name=value"),
        (["train", "--config", "/dev/null"], "is a device, not a regular file"),
        (["train", "--set", "threads=0"], "--set threads must be a whole number, 1 or more"),
        (["train", "--data", "images"], "digits brings its own data"),
        (["train", "--set", "data.typo=1"], "unknown setting 'typo' of the data; known: seed"),
        (["train", "--set", "model.typo=1"], "unknown setting 'typo' of the model; known: "),
        (["train", "--set", "warmup=soon"], "warmup='soon': expected a number"),
        (["train", "--set", "seed=1"], "--set seed: it has an option of its own, --seed"),
        (["train", "--set", "report_to=wandb"], "report_to='wandb': expected a list of text"),
        (["train", "--set", "precision=fp16"], "precision='fp16' needs a GPU"),
        (["train", "--set", "micro_batch=7"], "micro_batch=7 does not divide the 64 rows"),
        (["train", "--task", "vit_imagenet"], "reads data of yours: say where, --data PATH"),
        (["train", "--task", "t5_c4", "--data", "/dev/null"], "where, --set data.tokenizer=PATH"),
        (["train", "--task", "lm_finetune"], "lm_finetune finetunes a checkpoint: say which"),
        (["train", "--task", "lm_finetune", "--set", "model.n_embd=9"], "model that start names"),
        (["train", "--settings", "mine"], "settings='mine': expected paper or program"),
        (["train", "--steps", "0"], "steps=0: expected a whole number, 1 or more"),
        (["train", "--out", "/dev/full/runs"], "cannot"),
        (["compare", "--out", "/dev/null"], "cannot"),
        (["blocks", "nothing"], "no model 'nothing': expected one of digits, text, lm"),
        (["report", "/dev/null"], "no records under"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words: list[str], said: str) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


def test_a_setting_can_be_taken_back_and_wins_over_an_option() -> None:
    from actsparse_lab.cli.options import chosen
    from actsparse_lab.tasks import run_config

    words = ["lora=null", "clip=null", "steps=7", "data.held_out=0.2", "start=x"]
    overrides, threads = chosen("vit_imagenet_finetune", False, "images", "paper", 5, None, words)
    assert threads == 1
    config = run_config("vit_imagenet_finetune", "vanilla", 0, **overrides)
    assert (config.lora, config.clip, config.steps) == (None, None, 7)
    assert (config.data["held_out"], config.data["path"]) == (0.2, "images")
    words = ["lora.r=8", "start=x"]
    less, _ = chosen("vit_imagenet_finetune", False, "images", "paper", None, None, words)
    assert run_config("vit_imagenet_finetune", "vanilla", 0, **less).lora == {
        "r": 8, "alpha": 1.0, "targets": "all-linear", "biases": True,
    }  # fmt: skip


@pytest.mark.slow
def test_compare_asked_to_end_leaves_checkpoints(tmp_path: Path) -> None:
    words = ["compare", "--arms", "vanilla", "--seeds", "1", "--steps", "5000", "--set"]
    words += ["eval_every=5000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any(b'"train"' in each for each in records(tmp_path).values()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert len(list(tmp_path.glob("runs/vanilla-seed0/checkpoint-*/manifest.json"))) == 1


def test_help_has_an_example_for_every_verb_and_version_is_told() -> None:
    for verb in ("blocks", "train", "compare", "reproduce", "measure", "report"):
        done = CliRunner().invoke(app, [verb, "--help"])
        assert done.exit_code == 0
        assert f"actsparse {verb}" in done.stdout
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("actsparse ")
