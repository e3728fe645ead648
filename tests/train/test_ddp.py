"""Two gloo processes against one: the penalty's gradient is that of the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import in_two_processes


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_penalty_across_two_processes_is_that_of_one(accumulate: int, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    for world, parts in ((1, 1), (2, accumulate)):
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world)]
        words += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        words += [__file__, str(tmp_path), str(parts)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
    for name in ("gpt2", "Plain"):
        one = torch.load(tmp_path / f"{name}-1-1.pt", weights_only=True)
        two = torch.load(tmp_path / f"{name}-2-{accumulate}.pt", weights_only=True)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=1e-10)


def _vote(folder: Path, device: str) -> None:
    from actsparse.train.processes import everywhere

    rank = torch.distributed.get_rank()
    votes = [everywhere(fine, torch.device(device)) for fine in (True, rank == 0, False)]
    (folder / str(rank)).write_text(str(votes))


def test_a_nan_in_one_process_stops_all(tmp_path: Path) -> None:
    in_two_processes(_vote, tmp_path, "cpu")
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["[True, False, False]"] * 2


def _process(folder: Path, accumulate: int) -> None:
    import test_callback  # beside this file, where a script's imports begin

    from actsparse.modify import sparsify
    from actsparse.train import SparsityCallback

    world = int(os.environ["WORLD_SIZE"])
    for build in (test_callback.gpt2, test_callback.Plain):
        model = build()
        data = test_callback.rows(model, 8)
        handle = sparsify(model, test_callback.PENALTY, inputs=dict(data.columns))
        engine = test_callback.trainer(
            model,
            folder,
            [SparsityCallback(handle)],
            per_device_train_batch_size=8 // world // accumulate,
            gradient_accumulation_steps=accumulate,
            use_cpu=True,
        )
        engine.train_dataset = data
        engine.train()
        if os.environ["RANK"] == "0":
            torch.save(model.state_dict(), folder / f"{build.__name__}-{world}-{accumulate}.pt")


if __name__ == "__main__":
    _process(Path(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # as in tests/processes.py
