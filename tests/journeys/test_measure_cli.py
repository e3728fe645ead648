"""Why is this network sparse? From training with measures to those of a finished model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from actsparse.cli.main import app
from actsparse.modify import load
from actsparse.observe import measure
from actsparse_lab.engine.run import batches_of
from actsparse_lab.engine.tasks import task_of
from actsparse_lab.records import Run, read_run

QUICK = ["--rows", "16", "--batch-size", "16", "--probes", "3"]
DATA = """
import torch


def batches():
    ids = torch.arange(32).view(4, 8) % 20
    return (lambda m, b: (m(b["input_ids"]).logits[:, :-1], b["input_ids"][:, 1:])), [
        {"input_ids": ids[:2]},
        {"input_ids": ids[2:]},
    ]


def once():
    loss_fn, found = batches()
    return loss_fn, iter(found)


def nothing():
    return []
"""


def called(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 6 steps."""
    out = tmp_path_factory.mktemp("trained")
    words = ["train", "--arm", "paper", "--steps", "6"]
    words += ["--set", "batch_size=16", "--set", "log_every=3", "--set", "active_on=16"]
    words += ["--set", "eval_every=3", "--set", "measures=flatness,gradient,spectrum,token_copies"]
    words += ["--set", "active_every=3", "--out", str(out)]
    done = called(*words)
    assert done.exit_code == 0, done.output
    return out / "runs" / "paper-seed0"


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(trained, tmp_path / "paper-seed0"))


def record(folder: Path) -> Run:
    return read_run(folder / "record.jsonl")


def test_training_keeps_what_was_measured(trained: Path) -> None:
    run = record(trained)
    assert [line["step"] for line in run.train] == [3, 6]
    for line in run.train:
        measures = line["measures"]
        assert {"flatness", "gradient_sparsity", "loss_reduction"} <= measures.keys()
        # sums of some ten thousand float32 products on either side
        density = measures["derivative_density"]
        assert measures["density_from_flatness"] == pytest.approx(density, rel=1e-4)
    assert [line["step"] for line in run.measured] == [0, 3, 6]
    assert all(line["curvature"]["token_copies"]["value"] > 0 for line in run.measured)
    assert run.result is not None
    assert [entry["layer"] for entry in run.result["spectra"]] == ["up", "down"] * 2


def test_a_runs_measures_lie_beside_its_record_and_are_printed(folder: Path) -> None:
    done = called("measure", folder, *QUICK)
    assert done.exit_code == 0, done.stderr
    for word in ("derivative sparsity", "η sparsity", "of down", "token_copies", "3 probes"):
        assert word in done.stdout
    assert "token_copies: 3 passes" in done.stderr
    assert f"measures: {folder / 'measures.json'}" in done.stderr
    kept = json.loads((folder / "measures.json").read_text())
    assert (kept["kind"], kept["schema"], kept["task"], kept["arm"], kept["seed"]) == (
        "measures", 1, "digits", "paper", 0,
    )  # fmt: skip
    assert {"data": "digits", "split": "validation", "samples": 16}.items() <= kept["how"].items()
    assert {"versions", "hardware", "git"} <= kept.keys()
    run = record(folder)
    model = load(folder / "weights")
    task = task_of("digits")
    from actsparse_lab.engine.config import RunConfig

    rows = task.splits(RunConfig(**run.header["config"])).validation
    expected = measure(
        model, task.predict, batches_of(rows, 16, 16), kept["how"]["measures"], probes=3
    )
    for key in ("measures", "curvature", "spectra"):
        assert kept[key] == json.loads(json.dumps(expected.to_json()[key]))


def test_json_holds_the_same_numbers_and_goes_where_it_is_sent(folder: Path) -> None:
    other = folder.parent / "there" / "found.json"
    words = ["--measures", "flatness, hessian", "--labels", "model", "--split", "test"]
    done = called("measure", folder, *QUICK, *words, "--json", "--out", other)
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == json.loads(other.read_text())
    assert not (folder / "measures.json").exists()
    assert told["measures"]["flatness_error"] > 0
    assert told["curvature"]["hessian"]["probes"] == 3
    assert (told["how"]["labels"], told["how"]["split"]) == ("model", "test")


def test_trials_are_printed_and_kept(folder: Path) -> None:
    names = ["--measures", "robustness,covering,pruning"]
    done = called("measure", folder, *QUICK, *names)
    assert done.exit_code == 0, done.stderr
    for word in ("robustness", "fgsm", "covering", "r99", "pruning", "cosine"):
        assert word in done.stdout
    assert "robustness: 17 passes" in done.stderr
    kept = json.loads((folder / "measures.json").read_text())
    assert (kept["measures"], kept["curvature"], kept["how"]["samples"]) == (None, {}, 16)
    told = called("measure", folder, *QUICK, *names, "--json")
    assert json.loads(told.stdout)["trials"] == kept["trials"]
    task, run = task_of("digits"), record(folder)
    from actsparse_lab.engine.config import RunConfig

    splits = task.splits(RunConfig(**run.header["config"]))
    bounded = {"covering": {"bounds": splits.info["bounds"]}}
    batches = batches_of(splits.validation, 16, 16)
    expected = measure(load(folder / "weights"), task.predict, batches, bounded).trials
    assert kept["trials"]["covering"] == expected["covering"]


@pytest.mark.usefixtures("undrawn")
def test_runs_that_only_tried_something_have_a_report(tmp_path: Path) -> None:
    words = ["train", "--arm", "vanilla", "--steps", "4"]
    words += ["--set", "batch_size=16", "--set", "log_every=2"]
    active = '{"robustness": {"against": [{"disturbance": "fgsm", "size": 0.1}]}}'
    words += [
        "--set",
        f"active={active}",
        "--set",
        "active_on=16",
        "--set",
        "eval_every=4",
        "--out",
        str(tmp_path),
    ]
    done = called(*words)
    assert done.exit_code == 0, done.output
    run = tmp_path / "runs" / "vanilla-seed0"
    assert [line["measures"] for line in record(run).measured] == [None, None]
    assert called("measure", run, *QUICK, "--measures", "pruning").exit_code == 0
    for words in (["report", str(tmp_path)], ["report", str(tmp_path), "--markdown"]):
        done = called(*words)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").exists()


def test_what_cannot_be_kept_is_printed_still(folder: Path) -> None:
    blocked = folder / "record.jsonl" / "found.json"
    words = ["--measures", "density", "--json", "--out", blocked]
    done = called("measure", folder, *QUICK, *words)
    assert done.exit_code == 2
    assert "cannot write" in done.stderr
    assert json.loads(done.stdout)["measures"]["density"] > 0


def test_a_checkpoint_is_told_on_which_task(folder: Path) -> None:
    words = [*QUICK, "--measures", "density", "--json"]
    done = called("measure", folder / "weights", "--task", "digits", *words)
    assert done.exit_code == 0, done.stderr
    assert "arm" not in json.loads(done.stdout)
    assert not (folder / "weights" / "measures.json").exists()
    of_run = called("measure", folder, *words)
    assert json.loads(of_run.stdout)["measures"] == json.loads(done.stdout)["measures"]


# --- folders of Hugging Face --------------------------------------------------------------------


@pytest.fixture
def gpt2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, activation_function="relu",
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "its_data.py").write_text(DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "its_data", raising=False)
    return tmp_path / "gpt2"


def test_a_folder_of_hugging_face_on_data_of_ones_own(gpt2: Path) -> None:
    words = ["--measures", "density,flatness,token_copies", "--reduction", "sum", "--json"]
    done = called("measure", gpt2, "--data", "its_data:batches", *words)
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["how"]["samples"] == 4
    assert told["how"]["positions"] == 7
    assert (told["how"]["reduction"], told["how"]["data"]) == ("sum", "its_data:batches")
    assert told["measures"]["blocks"][1]["block"] == "transformer.h.1.mlp"


def test_token_ids_take_noise_and_no_attack(gpt2: Path) -> None:
    words = ["measure", gpt2, "--data", "its_data:batches", "--json", "--measures"]
    one_error(called(*words, "density,robustness"), "token ids cannot be moved by a gradient")
    noise = '{"robustness": {"against": [{"disturbance": "noise", "at": "d", "size": 0.3}]}}'
    done = called(*words, noise)
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["trials"]["robustness"]
    assert [(row["disturbance"], row["samples"]) for row in rows] == [("clean", 4), ("noise", 4)]


def spoiled(gpt2: Path, how: str) -> None:
    weights = gpt2 / "model.safetensors"
    if how == "torn":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "gone":
        weights.unlink()
    elif how == "less":
        from safetensors.torch import load_file, save_file

        state = load_file(weights)
        del state["transformer.h.0.mlp.c_fc.weight"]
        save_file(state, weights, metadata={"format": "pt"})
    else:
        config = json.loads((gpt2 / "config.json").read_text()) | {"architectures": ["Nothing"]}
        (gpt2 / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("torn", "cannot load"),
        ("gone", "model.safetensors"),
        ("less", "it lacks 1 weights: transformer.h.0.mlp.c_fc.weight"),
        ("other", "'Nothing' is not a model class of transformers"),
    ],
)
def test_weights_are_never_made_up(gpt2: Path, how: str, said: str) -> None:
    spoiled(gpt2, how)
    done = called("measure", gpt2, "--data", "its_data:batches")
    one_error(done, said)


# --- what cannot be -----------------------------------------------------------------------------


def one_error(done: Any, said: str) -> None:
    assert done.exit_code == 2, done.output
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert said in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "dogs"], "unknown task 'dogs'; known: digits, text, lm"),
        (["--measures", "flatnes"], "unknown measure 'flatnes'; known: covering, density"),
        (["--measures", '{"density": '], """--measures '{"density": ': not whole JSON"""),
        (["--measures", '{"pruning": {"at": 1}}'], "pruning has no option 'at'; known: thresholds"),
        (["--split", "all"], "unknown split 'all'; known: train, validation, test"),
        (["--labels", "mine"], """labels must be "data" or "model", got 'mine'"""),
        (["--reduction", "max"], """reduction must be "mean" or "sum" over positions, got 'max'"""),
        (["--task", "digits", "--data", "a:b"], "give --task or --data, not both"),
        (["--data", "no_such_module:f"], "cannot import 'no_such_module:f'"),
    ],
)
def test_a_wrong_word_is_an_error(trained: Path, words: list[str], said: str) -> None:
    one_error(called("measure", trained, *QUICK, *words), said)
    assert not (trained / "measures.json").exists()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("once", "batches must be a list, or a DataLoader with a length"),
        ("nothing", "its_data:nothing returned list; expected (predict, batches)"),
        ("gone", "cannot import 'its_data:gone'"),
    ],
)
def test_wrong_data_are_an_error(gpt2: Path, function: str, said: str) -> None:
    one_error(called("measure", gpt2, "--data", f"its_data:{function}"), said)
    words = ["--task", "digits"]
    one_error(called("measure", gpt2, *words), "the model does not run on the data of digits")
    one_error(called("measure", gpt2), "does not say on what to measure it: give --task or --data")


def test_a_wrong_folder_is_an_error(folder: Path) -> None:
    empty = folder.parent / "empty"
    empty.mkdir()
    for place in (empty, empty / "nothing", folder / "record.jsonl"):
        one_error(called("measure", place), "is neither a run's folder (record.jsonl) nor a checkp")
    text = (folder / "record.jsonl").read_text()
    header = json.loads(text.splitlines()[0])
    for changes, said in (
        ({"task": "cats"}, "unknown task 'cats'; known: digits, text, lm"),
        ({"config": {}}, "has the config of another actsparse"),
    ):
        lines = [json.dumps(header | changes), *text.splitlines()[1:]]
        (folder / "record.jsonl").write_text("\n".join(lines) + "\n")
        one_error(called("measure", folder), said)
    (folder / "record.jsonl").write_text(text[:100])
    one_error(called("measure", folder), "no whole first line")
    (folder / "record.jsonl").write_text(text)
    (folder / "weights" / "actsparse.json").unlink()
    one_error(called("measure", folder), "actsparse.json is missing")
    shutil.rmtree(folder / "weights")
    one_error(called("measure", folder), "has no weights/: nothing to measure")


def test_a_record_torn_at_its_end_is_measured_still(folder: Path) -> None:
    whole = (folder / "record.jsonl").read_bytes()
    (folder / "record.jsonl").write_bytes(whole[:-20])
    done = called("measure", folder, *QUICK, "--measures", "density")
    assert done.exit_code == 0, done.stderr


def test_a_model_without_mlps_has_nothing_to_measure(tmp_path: Path) -> None:
    from actsparse import LeaveOutMLP, save, sparsify
    from actsparse_lab.tasks import run_config

    config = run_config("digits", "vanilla", 0)
    model = task_of("digits").model(config, {"classes": 10})
    sparsify(model, LeaveOutMLP(), inputs={"pixel_values": torch.zeros(1, 1, 8, 8)})
    save(model, tmp_path / "left-out")
    done = called("measure", tmp_path / "left-out", "--task", "digits")
    one_error(done, "leaves the MLPs out")
