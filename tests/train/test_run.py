"""One run: paired starts, an honest record, and clear ends when something is wrong."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actsparse.modify import Recipe, load, sparsify
from actsparse.observe import CURVATURES, MEASURES, TRIALS, measure
from actsparse.train import TrainingFailed
from actsparse_lab.data import image_splits, load_digits_splits
from actsparse_lab.engine.config import RunConfig, recorded_config
from actsparse_lab.engine.run import batches_of, run
from actsparse_lab.engine.tasks import TASKS, task_of
from actsparse_lab.records import RecordError, read_run, run_path
from actsparse_lab.tasks import default_arms, run_config
from actsparse_lab.tasks.digits import digits

EMBEDDED = ("digits", "text", "lm")
TINY: dict[str, Any] = {"steps": 6, "batch_size": 8, "log_every": 3, "eval_every": 3}


def config(arm: str = "vanilla", task: str = "digits", seed: int = 0, **settings: Any) -> RunConfig:
    return run_config(task, arm, seed, **TINY | settings)


@pytest.mark.parametrize("task", EMBEDDED)
def test_the_same_seed_starts_every_arm_from_the_same_weights(task: str) -> None:
    starts = []
    for arm in default_arms("digits"):
        settings = config(arm, task)
        torch.manual_seed(settings.seed)
        model = task_of(task).model(settings, {"classes": 10})
        plain = {name: value.clone() for name, value in model.state_dict().items()}
        row = task_of(task).splits(settings).train[0]
        inputs = {name: value[None] for name, value in row.items()}
        sparsify(model, Recipe.from_json(settings.recipe), inputs=inputs)
        for name, value in plain.items():  # the recipe adds, and starts from where it is
            assert torch.equal(model.state_dict()[name], value), f"{arm}: {name}"
        starts.append(plain)
    for other in starts[1:]:
        assert all(torch.equal(starts[0][name], other[name]) for name in starts[0])


def test_the_same_seed_gives_every_arm_the_same_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: dict[str, list[Tensor]] = {}
    for arm in ("vanilla", "paper", "weight-noise"):  # weight noise draws random numbers itself
        seen = batches[arm] = []
        task = TASKS["digits"]

        def model(
            settings: RunConfig, info: Any, seen: list[Tensor] = seen, task: Any = task
        ) -> Any:
            built = task.model(settings, info)
            built.register_forward_pre_hook(
                lambda module, args, kwargs: (
                    seen.append(kwargs["labels"].clone()) if module.training else None
                ),
                with_kwargs=True,
            )
            return built

        with monkeypatch.context() as patch:
            patch.setitem(TASKS, "digits", type(task)(**{**vars(task), "model": model}))
            run(config(arm), tmp_path)
    first, *others = batches.values()
    for other in others:
        assert [each.tolist() for each in other[-6:]] == [each.tolist() for each in first[-6:]]


def test_a_run_leaves_a_whole_record_and_its_weights(tmp_path: Path) -> None:
    steps: list[int] = []
    done = run(config("paper"), tmp_path, command="make it so", on_step=steps.append)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in done.train] == [3, 6]
    assert [line["step"] for line in done.evals] == [0, 3, 6]
    assert {line["split"] for line in done.evals} == {"validation"}
    assert done.result is not None
    assert done.result["split"] == "test"
    assert done.result["inference"]["blocks"][0]["tokens"] == 300 * 17
    assert done.result["training"]["blocks"][0]["tokens"] == 2 * 8 * 17  # from step 4 on
    assert 0 < done.result["skippable"]["forward"] < 0.5 < 1
    assert done.header["config"]["recipe"]["name"] == "paper"
    assert done.header["command"] == "make it so"
    model = load(done.path.parent / "weights").eval()
    splits = task_of("digits").splits(config())
    right = 0
    with torch.no_grad():
        for row in (splits.test[index] for index in range(300)):
            right += int(model(row["pixel_values"][None]).logits.argmax() == row["labels"])
    assert right / 300 == pytest.approx(done.result["quality"])


def test_the_control_has_no_density(tmp_path: Path) -> None:
    done = run(config("no-mlp"), tmp_path)
    assert done.result is not None
    assert done.result["inference"] is done.result["training"] is done.result["skippable"] is None


@pytest.mark.parametrize(
    ("task", "unit"), [("text", "bits per hidden byte"), ("lm", "bits per byte")]
)
def test_text_is_scored_on_the_bytes_that_the_bigram_is(
    task: str, unit: str, tmp_path: Path
) -> None:
    done = run(config("vanilla", task, steps=2, eval_every=2, validate_on=16), tmp_path)
    assert done.result is not None
    assert done.result["quality_name"] == unit
    assert done.result["quality"] == pytest.approx(done.result["loss"] / math.log(2))
    assert 2.0 < done.result["baselines"]["bigram"] < 3.0
    assert done.result["loss"] > done.result["baselines"]["bigram"]  # two steps


def test_a_finished_run_is_not_repeated_and_an_unfinished_one_is(tmp_path: Path) -> None:
    path = run(config(), tmp_path).path
    whole = path.read_bytes()
    run(config(), tmp_path)
    assert path.read_bytes() == whole
    for rest in (whole[:-20], whole[:30], b""):
        path.write_bytes(rest)
        assert run(config(), tmp_path).finished


def test_a_finished_run_of_another_config_is_not_taken_for_this_one(tmp_path: Path) -> None:
    run(config(), tmp_path)
    with pytest.raises(ValueError, match=r"lr=0.005 \(now 0.1\).*--out"):
        run(config(lr=0.1), tmp_path)


def test_options_that_no_longer_exist_and_were_not_set_make_no_other_config(tmp_path: Path) -> None:
    path = run(config("best"), tmp_path).path
    first, rest = path.read_text().split("\n", 1)

    def recorded(**options: Any) -> bytes:
        header = json.loads(first)
        header["config"]["recipe"]["modifications"][1] |= options
        path.write_text(json.dumps(header) + "\n" + rest)
        return path.read_bytes()

    whole = recorded(release=None)  # as in records of 2026
    run(config("best"), tmp_path)
    assert path.read_bytes() == whole
    run(recorded_config(read_run(path)), tmp_path)
    assert path.read_bytes() == whole
    recorded(kind="hoyer_root")
    with pytest.raises(ValueError, match=r"recipe=.*hoyer_root.*\(now .*--out"):
        run(config("best"), tmp_path)


def test_a_nan_leaves_a_failed_record_and_the_last_good_weights(tmp_path: Path) -> None:
    settings = config(lr=1e30, eval_every=1)
    with pytest.raises(TrainingFailed, match="stopped after"):
        run(settings, tmp_path)
    done = read_run(run_path(tmp_path, "vanilla", 0))
    assert done.failed is not None
    assert not done.finished
    assert done.failed["step"] >= 1
    assert "nan" in done.failed["reason"] or "inf" in done.failed["reason"]
    weights = load(done.path.parent / "weights")
    assert all(bool(parameter.isfinite().all()) for parameter in weights.parameters())
    assert all(math.isfinite(line["loss"]) for line in done.evals)


def test_a_folder_that_cannot_be_written_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(RecordError, match=r"cannot write.*runs.*choose another folder"):
        run(config(), tmp_path)


def test_a_full_disk_is_an_error_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(RecordError, match="only 1 of 64 MiB are free"):
        run(config(), tmp_path)


def test_a_disk_that_fills_up_in_training_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def full(fd: int, data: bytes) -> int:
        if b'"kind": "train"' in data:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RecordError, match=r"record.jsonl: No space left.*free some space"):
        run(config(), tmp_path)
    assert not read_run(run_path(tmp_path, "vanilla", 0)).finished


def test_a_config_says_what_would_be_right() -> None:
    for name, value in {"steps": 0, "seed": -1, "lr": 0.0, "warmup": 2.0, "clip": 0.0}.items():
        settings: dict[str, Any] = {"task": "digits", "arm": "a", "seed": 0, name: value}
        with pytest.raises(ValueError, match=f"{name}={value}: expected"):
            RunConfig(**settings)
    assert json.loads(json.dumps(config("paper").to_json())) == config("paper").to_json()


# --- measures -----------------------------------------------------------------------------------


def of(value: Any, keys: tuple[str, ...]) -> Any:
    """``value`` with no keys but these, at any depth."""
    if isinstance(value, dict):
        return {key: of(each, keys) for key, each in value.items() if key in keys}
    return [of(each, keys) for each in value] if isinstance(value, list) else value


PLAIN = (
    "step", "loss", "lr", "split", "quality", "measures", "inference", "training", "skippable",
    "density", "dead", "blocks", "block", "tokens", "forward", "backward",
)  # fmt: skip


DROPOUT = {  # so that a random number drawn too many is seen
    "model": digits()["model"] | {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
}


ANY_PHI = [name for name in MEASURES if name != "occupancy"]  # which is of S-shapes


@pytest.mark.parametrize(
    ("settings", "measures"),
    [
        ({}, {"measures": ANY_PHI}),
        (
            DROPOUT,
            {
                "measures": ["flatness", "noise", *CURVATURES, *TRIALS],
                "active": ["density", "gradient"],
                "active_every": 4,
                "active_on": 4,
            },
        ),
    ],
)
def test_measures_change_nothing_in_training(
    settings: dict[str, Any], measures: dict[str, Any], tmp_path: Path
) -> None:
    expected = run(config(**settings), tmp_path / "plain")
    done = run(config(**settings, **measures), tmp_path / "measured")
    for lines in ("train", "evals", "result"):
        assert of(getattr(done, lines), PLAIN) == of(getattr(expected, lines), PLAIN)
    weights = load(expected.path.parent / "weights").state_dict()
    for name, value in load(done.path.parent / "weights").state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert [line["step"] for line in done.measured] == ([0, 4, 6] if "active" in measures else [])


def test_a_record_holds_what_was_measured(tmp_path: Path) -> None:
    settings = {"measures": ["flatness", "gradient", "spectrum", "token_copies"], "active_on": 10}
    done = run(config("paper", **settings, active_every=4), tmp_path)
    assert done.header["config"]["measures"] == ["density", "flatness", "gradient", "spectrum"]
    assert done.header["config"]["active"] == ["token_copies"]
    for line in done.train:
        for row in (line["measures"], *line["measures"]["blocks"]):
            # sums of some ten thousand float32 products on either side
            density = row["derivative_density"]
            assert row["density_from_flatness"] == pytest.approx(density, rel=1e-4)
        assert line["measures"]["samples"] == 3 * 8
        assert line["measures"]["loss_reduction"] == "mean"
    assert [line["step"] for line in done.measured] == [0, 4, 6]
    for line in done.measured:
        assert line["curvature"]["token_copies"]["value"] > 0
        assert line["how"]["samples"] == 10
    assert done.result is not None
    names = [row["block"] for row in done.result["inference"]["blocks"]]
    assert [(each["block"], each["layer"]) for each in done.result["spectra"]] == [
        (name, layer) for name in names for layer in ("up", "down")
    ]


def test_the_control_is_trained_and_not_measured(tmp_path: Path) -> None:
    done = run(config("no-mlp", measures=[*ANY_PHI, "token_copies", "pruning"]), tmp_path)
    assert done.result is not None
    assert "spectra" not in done.result
    assert done.measured == []
    assert all(line["measures"] is None for line in done.train)


def test_a_blow_up_that_measures_meet_first_is_a_failed_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="stopped after"):
        run(config(lr=1e30, active=("hessian",), active_every=1, active_on=4), tmp_path)
    failed = read_run(run_path(tmp_path, "vanilla", 0)).failed
    assert failed is not None
    assert "it cannot be measured: loss_fn on batch 0 returned logits" in failed["reason"]


def test_a_run_from_before_measures_is_still_finished(tmp_path: Path) -> None:
    path = run(config(), tmp_path).path
    header, *rest = path.read_text().splitlines()
    old = json.loads(header)
    for key in ("measures", "active", "active_every", "active_at", "active_on"):
        del old["config"][key]
    path.write_text("\n".join([json.dumps(old), *rest]) + "\n")
    before = path.read_bytes()
    assert run(config(), tmp_path).finished
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match=r"active=\[\] \(now \['hessian'\]\)"):
        run(config(measures=["hessian"]), tmp_path)


# --- trials -------------------------------------------------------------------------------------

FGSM = {"disturbance": "fgsm", "size": 1.5}
TRIED: dict[str, Any] = {
    "robustness": {"against": [FGSM, {"disturbance": "noise", "at": "d", "size": 0.3}]},
    "gradient": {"epsilon": 1e-4},
}


def test_a_record_holds_what_was_tried_within_the_bounds_of_the_data(tmp_path: Path) -> None:
    settings = {"measures": ["covering"], "active_on": 20}
    done = run(config("paper", **settings, active=TRIED), tmp_path)
    assert done.header["config"]["active"] == TRIED | {"covering": {}}
    assert [line["step"] for line in done.measured] == [0, 6]
    splits, last = load_digits_splits(), done.measured[-1]
    model, task = load(done.path.parent / "weights"), task_of("digits")
    batches = batches_of(splits.validation, 20, 8)

    def tried(bounds: Any) -> dict[str, Any]:
        options = {
            "robustness": TRIED["robustness"] | {"bounds": bounds}, "covering": {"bounds": bounds}
        }  # fmt: skip
        return measure(model, task.predict, batches, options).trials

    assert last["trials"] == tried(splits.info["bounds"])
    assert last["trials"] != tried(None)  # 1.5 leaves the range of pixels
    assert last["how"]["samples"] == 20
    expected = measure(
        model, task.predict, batches, {"gradient": {"epsilon": 1e-4}}, labels="model"
    )
    assert expected.measures is not None
    assert last["measures"]["gradient_sparsity"] == expected.measures["gradient_sparsity"]


def test_trials_alone_leave_no_measures_and_own_bounds_win(tmp_path: Path) -> None:
    unbounded = {"robustness": {"against": [FGSM], "bounds": None}}
    done = run(config(active=unbounded, active_on=8), tmp_path)
    last = done.measured[-1]
    assert (last["measures"], last["curvature"]) == (None, {})
    assert last["how"]["samples"] == 8
    model, task = load(done.path.parent / "weights"), task_of("digits")
    batches = batches_of(load_digits_splits().validation, 8, 8)
    assert last["trials"] == measure(model, task.predict, batches, unbounded).trials


def test_options_of_what_is_measured_survive_a_record(tmp_path: Path) -> None:
    asked = config(active=TRIED, active_on=4)
    assert RunConfig(**asked.to_json()).to_json() == asked.to_json()
    run(asked, tmp_path)
    assert run(asked, tmp_path).finished  # and is not repeated: another would be an error
    with pytest.raises(ValueError, match=r"active={'robustness'.*now {'gradient'"):
        run(config(active={"gradient": {}}, active_on=4), tmp_path)
    names = config(active=["gradient", "pruning"])
    assert names.to_json() == config(active=("gradient", "pruning")).to_json()
    assert names.active == ("gradient", "pruning")
    both = config(active={"hessian": {"probes": 3}}, measures=["pruning", "hessian"]).active
    assert both == {"hessian": {"probes": 3}, "pruning": {}}


@pytest.mark.parametrize(
    ("active", "said"),
    [
        ({"robustnes": {}}, "active holds 'robustnes'; known: density, .*robustness, covering"),
        ({"robustness": {"agains": []}}, "robustness has no option 'agains'; known: against"),
        ({"gradient": {"eps": 1}}, "gradient has no option 'eps'; known: epsilon"),
        ({"gradient": 3}, "active={'gradient': 3}: expected names, or name → options as JSON"),
        ({"covering": {"attack": object()}}, "expected names, or name → options as JSON has them"),
        ({"covering": {"rho": math.nan}}, "expected names, or name → options as JSON has them"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_said_before_any_run(active: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(active=active)


def test_an_attack_on_token_ids_ends_a_run_before_its_first_step(tmp_path: Path) -> None:
    settings = {"validate_on": 4, "active_on": 4, "active": ["robustness"]}
    with pytest.raises(TrainingFailed, match=r"stopped after 0 steps: .*token ids cannot be moved"):
        run(config("vanilla", "lm", **settings), tmp_path)


def test_the_data_say_between_what_their_inputs_lie(tmp_path: Path) -> None:
    from PIL import Image

    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / place).mkdir(parents=True)
        for number, colour in enumerate(("black", "white", "red", "blue")):
            Image.new("RGB", (8, 8), colour).save(tmp_path / place / f"{number}.png")
    images = image_splits(tmp_path, size=8, steps=1, batch=1, seed=0)
    digits_of = load_digits_splits()
    for splits, axes in ((images, (0, 2, 3)), (digits_of, (0, 1, 2, 3))):
        rows = [splits.test[index]["pixel_values"] for index in range(len(splits.test))]
        low, high = (torch.tensor(bound) for bound in splits.info["bounds"])
        # exactly, or clean inputs would be out of bounds by a rounding
        assert torch.equal(torch.stack(rows).amin(axes), low.reshape(-1).squeeze())
        assert torch.equal(torch.stack(rows).amax(axes), high.reshape(-1).squeeze())
        assert json.loads(json.dumps(splits.info)) == splits.info
