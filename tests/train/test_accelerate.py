"""Training accelerated: the same training, watched at the steps that are logged, and undone."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from actsparse.kernels import mlp
from actsparse.modify import Handle, load, sparsify
from actsparse.observe import measure, observe
from actsparse.train import SparsityCallback, TrainingFailed
from actsparse_lab.data import TensorRows
from actsparse_lab.engine.run import run
from actsparse_lab.engine.tasks import TASKS
from actsparse_lab.records import RecordWriter, Run, environment, read_run
from actsparse_lab.tasks import run_config

EPS = torch.finfo(torch.float32).eps
TINY: dict[str, Any] = {"steps": 6, "batch_size": 8, "log_every": 3, "eval_every": 3}


SPARSE = [0]  # calls of the kernels


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def sparse_mlp(*args: Any, **options: Any) -> Tensor:
        SPARSE[0] += 1
        return mlp.sparse_mlp(*args, **options)

    monkeypatch.setattr("actsparse.kernels.programs.sparse_mlp", sparse_mlp)


class Net(nn.Module):
    """One block in float32, which notes how each call of it ran."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 32), activation(), nn.Linear(32, 8))
        self.head = nn.Linear(8, 3)
        self.calls: list[tuple[str, str]] = []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        before = sum(SPARSE)
        logits = self.head(self.body(x) + x)
        how = "sparse" if sum(SPARSE) > before else "dense"
        self.calls.append(("train" if self.training else "inference", how))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(count: int = 8) -> TensorRows:
    generator = torch.Generator().manual_seed(1)
    return TensorRows(
        x=torch.randn(count, 8, generator=generator),
        labels=torch.randint(3, (count,), generator=generator),
    )


def trainer(model: nn.Module, callback: SparsityCallback, folder: Path, **settings: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential", "dataloader_pin_memory": False,
    } | settings  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=rows(),
        eval_dataset=rows(),
        optimizers=(optimizer, schedule),
        callbacks=[callback],
    )


def handle_of(model: Net) -> Handle:
    handle = sparsify(model, "vanilla", inputs=dict(rows(2).columns))
    model.calls.clear()  # the finder's
    return handle


def trained(accelerate: Any, folder: Path, **settings: Any) -> tuple[Net, SparsityCallback]:
    model = Net()
    callback = SparsityCallback(handle_of(model), accelerate=accelerate)
    trainer(model, callback, folder, **settings).train()
    return model, callback


def assert_close(one: nn.Module, two: nn.Module) -> None:
    """Four steps of rounding apart, of sums of up to 32 products of numbers of about 1."""
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=32 * 4 * EPS, msg=name)


# --- the callback -------------------------------------------------------------------------------


def test_an_accelerated_training_is_the_same_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    dense, none = trained(False, tmp_path)
    sparse, callback = trained("sparse", tmp_path)
    assert set(dense.calls) == {("train", "dense")}
    assert set(sparse.calls) == {("train", "sparse")}
    assert_close(sparse, dense)
    assert none.accelerated is None
    assert str(callback.accelerated).startswith("body")
    sparse.calls.clear()
    for each in (dense, sparse):
        each.load_state_dict(dense.state_dict())
    outputs = [each(**rows().columns)["logits"] for each in (dense, sparse)]
    assert torch.equal(*outputs)
    assert sparse.calls == [("train", "dense")]


def test_true_means_where_that_is_faster_and_here_it_is_not(tmp_path: Path) -> None:
    dense, _ = trained(False, tmp_path)
    auto, callback = trained(True, tmp_path)
    assert set(auto.calls) == {("train", "dense")}
    assert all(
        torch.equal(a, b) for a, b in zip(auto.parameters(), dense.parameters(), strict=True)
    )
    assert callback.accelerated is not None


def test_where_no_block_can_run_sparse_it_says_so_before_training(tmp_path: Path) -> None:
    model = Net(nn.GELU)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    callback = SparsityCallback(handle_of(model), accelerate=True)
    with pytest.raises(
        ValueError, match=r"no block can be run sparse: body.*gelu is never exactly"
    ):
        trainer(model, callback, tmp_path).train()
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    other = SparsityCallback(handle_of(Net()), accelerate="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown mode 'fast'; known: auto, dense, sparse"):
        trainer(other.handle.model, other, tmp_path).train()


def test_resumed_from_a_checkpoint_it_ends_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole, _ = trained("sparse", tmp_path, **saving)
    model = Net()
    callback = SparsityCallback(handle_of(model), accelerate="sparse")
    engine = trainer(model, callback, tmp_path, **saving)
    engine.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert model.calls == [("train", "sparse")] * 2
    assert_close(model, whole)


def test_after_a_training_that_failed_the_next_accelerates_anew(tmp_path: Path) -> None:
    model = Net()
    handle = handle_of(model)
    seen = observe(model, blocks=handle.blocks)
    callback = SparsityCallback(handle, seen, accelerate="sparse")
    engine = trainer(model, callback, tmp_path)
    good, engine.train_dataset = engine.train_dataset, rows()
    engine.train_dataset.columns["x"][2:] = torch.nan
    with pytest.raises(TrainingFailed, match="after 1 steps"):
        engine.train()
    model.load_state_dict(Net().state_dict())
    engine.train_dataset = good
    engine.train()
    assert model.calls[-4:] == [("train", "sparse")] * 3 + [("train", "dense")]  # the last is read


def test_closed_early_it_leaves_the_blocks_and_what_observes_as_before(tmp_path: Path) -> None:
    model = Net()
    handle = handle_of(model)
    with observe(model, blocks=handle.blocks) as seen:
        callback = SparsityCallback(handle, seen, accelerate="sparse")
        engine = trainer(model, callback, tmp_path)
        engine.train_dataset.columns["x"][2:] = torch.nan  # type: ignore[union-attr]
        with pytest.raises(TrainingFailed, match="after 1 steps"):
            engine.train()
        assert seen.summary("train") is None
        callback.close()
        callback.close()
        model(**rows().columns)
        summary = seen.summary("train")
        assert summary is not None
        assert summary["blocks"][0]["tokens"] == 8
    callback.close()
    model(**rows().columns)
    assert seen.summary("train") == summary


# --- with what observes -------------------------------------------------------------------------


def recorded(accelerate: Any, folder: Path, **settings: Any) -> tuple[Run, Net, SparsityCallback]:
    """Seven steps, watched; evaluated before them, every third and at the end."""
    model = Net()
    handle = handle_of(model)
    path = folder / str(accelerate) / "record.jsonl"
    header = {"task": "t", "arm": "a", "seed": 0, "config": {}, **environment()}
    evaluating = {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}
    with RecordWriter(path, header) as record, observe(model, blocks=handle.blocks) as seen:
        callback = SparsityCallback(
            handle, seen, record, accelerate=accelerate, **settings.pop("callback", {})
        )
        engine = trainer(
            model, callback, folder, max_steps=7, **evaluating | {"logging_steps": 3} | settings
        )
        engine.train()
        model.eval()(**rows().columns)  # the user's own, afterwards
        assert seen.summary("inference") is not None
    return read_run(path), model, callback


def test_seen_watches_the_steps_that_are_logged_and_evaluations(tmp_path: Path) -> None:
    done, model, callback = recorded("sparse", tmp_path)
    ran = [how for phase, how in model.calls if phase == "train"]
    assert [step for step, how in enumerate(ran, start=1) if how == "dense"] == [3, 6, 7]
    assert {how for phase, how in model.calls if phase == "inference"} == {"dense"}
    assert [line["step"] for line in done.train] == [3, 6, 7]
    assert [line["measures"]["steps"] for line in done.train] == [1, 1, 1]
    assert [line["measures"]["blocks"][0]["tokens"] for line in done.train] == [2, 2, 2]
    assert [line["step"] for line in done.evals] == [0, 3, 6, 7]
    assert [line["measures"]["blocks"][0]["tokens"] for line in done.evals] == [8, 8, 8, 8]
    late = callback.training()
    assert late is not None
    assert (late["steps"], late["blocks"][0]["tokens"]) == (2, 4)  # steps 6 and 7


def test_what_is_read_at_a_step_is_that_steps(tmp_path: Path) -> None:
    every, _, _ = recorded(False, tmp_path, logging_steps=1)
    some, _, _ = recorded("sparse", tmp_path)
    by_step = {line["step"]: line["measures"] for line in every.train}
    for line in some.train:
        assert "steps" not in by_step[line["step"]]
        # one unit of 32 on one of 2 tokens may sit so near zero that rounding decides
        expected = pytest.approx(by_step[line["step"]]["density"], abs=1.01 / 64)
        assert line["measures"]["density"] == expected
    for one, two in zip(every.evals, some.evals, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        ({"logging_first_step": True}, [1, 3, 6, 7]),
        ({"logging_strategy": "epoch", "eval_strategy": "epoch", "eval_steps": None}, [3, 6, 7]),
        ({"logging_strategy": "no", "logging_steps": 0}, [7]),
        ({"gradient_accumulation_steps": 2, "logging_steps": 4}, [7, 8, 13, 14]),
    ],
)
def test_other_ways_to_log_and_to_accumulate(
    settings: dict[str, Any], dense: list[int], tmp_path: Path
) -> None:
    done, model, _ = recorded("sparse", tmp_path, **settings)
    ran = [how for phase, how in model.calls if phase == "train"]
    assert [batch for batch, how in enumerate(ran, start=1) if how == "dense"] == dense
    assert all(line["measures"]["steps"] >= 1 for line in done.train)
    assert all(line["measures"]["blocks"][0]["tokens"] == 8 for line in done.evals)


def test_curvature_is_measured_between_accelerated_steps(tmp_path: Path) -> None:
    """It differentiates twice, which only the layers allow."""

    def loss(model: nn.Module, batch: Any) -> Any:
        return model(**batch)["loss"]

    def active(model: nn.Module) -> Any:
        return measure(model, loss, [rows().columns], ["hessian"], probes=4)

    found = [
        recorded(how, tmp_path, callback={"active": active, "active_every": 2})[0].measured
        for how in (False, "sparse")
    ]
    assert [line["step"] for line in found[1]] == [0, 2, 4, 6, 7]
    for dense, sparse in zip(*found, strict=True):
        value = dense["curvature"]["hessian"]["value"]
        assert sparse["curvature"]["hessian"]["value"] == pytest.approx(value, rel=1e-3)


# --- runs ---------------------------------------------------------------------------------------


def test_a_run_says_that_it_was_accelerated_and_how(tmp_path: Path) -> None:
    plain = run(run_config("digits", "paper", 0, **TINY), tmp_path / "dense")
    done = run(run_config("digits", "paper", 0, accelerate="sparse", **TINY), tmp_path / "sparse")
    assert done.header["config"]["accelerate"] == "sparse"
    assert plain.result is not None
    assert done.result is not None
    assert "accelerated" not in plain.result["time"]
    blocks = [row["block"] for row in done.result["inference"]["blocks"]]
    assert [line.split(":")[0] for line in done.result["time"]["accelerated"]] == blocks
    assert done.result["training"]["steps"] == 1
    assert done.result["inference"]["blocks"][0]["tokens"] == 300 * 17
    assert done.result["loss"] == pytest.approx(plain.result["loss"], rel=1e-3)
    weights = load(done.path.parent / "weights").state_dict()
    assert weights.keys() == load(plain.path.parent / "weights").state_dict().keys()


def test_the_control_has_no_block_to_accelerate(tmp_path: Path) -> None:
    done = run(run_config("digits", "no-mlp", 0, accelerate=True, **TINY), tmp_path)
    assert done.result is not None
    assert "accelerated" not in done.result["time"]


def test_a_run_from_before_acceleration_is_still_finished_and_is_not_an_accelerated_one(
    tmp_path: Path,
) -> None:
    path = run(run_config("digits", "vanilla", 0, **TINY), tmp_path).path
    header, *rest = path.read_text().splitlines()
    old = json.loads(header)
    del old["config"]["accelerate"]
    path.write_text("\n".join([json.dumps(old), *rest]) + "\n")
    before = path.read_bytes()
    assert run(run_config("digits", "vanilla", 0, **TINY), tmp_path).finished
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match=r"accelerate=False \(now True\)"):
        run(run_config("digits", "vanilla", 0, accelerate=True, **TINY), tmp_path)
    with pytest.raises(ValueError, match="accelerate='fast': expected one of False, True"):
        run_config("digits", "vanilla", 0, accelerate="fast")


# --- 500 steps ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_500_steps_agree_within_the_spread_of_two_thread_counts(tmp_path: Path) -> None:
    """The paper's recipe on bytes, from one seed: dense on 1 thread and on 2, and sparse on 1.

    Training is chaotic: whatever rounds differently, by 1e-7, is a few hundredths of a nat away
    after some 60 steps and stays there, so that the three curves are three draws. Compared are the
    root mean squares of the two differences over all steps. With a window of 50 steps as one
    draw, the first of them before the curves part, the squares' ratio is F(9, 9), which is above
    10.1 one time in 1000: its root above 3.2. Rounded down to 3.

    That was checked on dense runs that differ by the order of their hidden units: of the triples
    among 13 none comes above 2.3. (Not every seed is like this one: with seed 3 some runs branch
    off for good, windows are not independent, and 7 % of the triples among 24 come above 3.) Wrong
    kernels are seen where they change the training: a block's y that is 1 % too large gives 4.0, a
    gradient that lacks a twentieth of the tokens 2.5, one unit of 192 left out 0.9.
    """
    curves = {
        name: curve(tmp_path / f"{name}.npy", threads, how)
        for name, threads, how in (("one", 1, ""), ("two", 2, ""), ("sparse", 1, "sparse"))
    }
    dense = curves["one"]
    assert dense.shape == (500,)
    assert dense[-50:].mean() < 0.6 * dense[0]
    # the mean of 8 × 63 cross-entropies of logits that are sums of 48 products
    assert abs(curves["sparse"][0] - dense[0]) <= 48 * EPS * dense[0]
    spread, apart = (rms(curves[name] - dense) for name in ("two", "sparse"))
    assert spread > 0, "two thread counts gave the same numbers, which is no spread to compare with"
    assert apart > 0, "the accelerated run gave the dense run's numbers: did it run sparse?"
    assert apart <= 3 * spread, f"{apart:.4f} nats apart, two thread counts {spread:.4f}"


def rms(difference: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(difference**2)))


def curve(path: Path, threads: int, accelerate: str) -> NDArray[np.float64]:
    """The training loss at each step, of a run in a process of its own."""
    root = Path(__file__).parents[2]
    # two spinning threads would wait for one another where cores are shared
    settings = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, __file__, str(path), str(threads), accelerate],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, **settings, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return np.load(path)


def _process(path: str, threads: int, accelerate: str) -> None:
    torch.set_num_threads(threads)
    task, losses = TASKS["lm"], []

    def model(config: Any) -> Any:
        built = task.model(config)
        built.register_forward_hook(
            lambda module, args, output: (
                losses.append(output.loss.item()) if module.training else None
            )
        )
        return built

    TASKS["lm"] = dataclasses.replace(task, model=model)
    rare = {"log_every": 500, "eval_every": 500, "validate_on": 8}  # each such step runs dense
    config = run_config(
        "lm", "paper", 0, steps=500, batch_size=8, accelerate=accelerate or False, **rare
    )
    with tempfile.TemporaryDirectory() as out:
        run(config, out)
    np.save(path, losses)


if __name__ == "__main__":
    _process(sys.argv[1], int(sys.argv[2]), sys.argv[3])
