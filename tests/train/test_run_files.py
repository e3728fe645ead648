"""The folder of a run: who else is at it, what was deleted or cut in it, what is left in it."""

from __future__ import annotations

import errno
import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actsparse_lab.engine import run as run_module
from actsparse_lab.engine import run_gradient_noise
from actsparse_lab.engine.folder import alone
from actsparse_lab.engine.run import run
from actsparse_lab.records import RecordError, Run, run_path
from actsparse_lab.tasks import run_config
from tests.train.test_survival import TINY, lines_of, stopped, whole

__all__ = ["whole"]


def finished_meanwhile(
    monkeypatch: pytest.MonkeyPatch, module: Any, do: Callable[[], object]
) -> list[str]:
    """A second copy of a command does the run after this one has looked for it."""
    claimed, order = module.claimed, []

    def late(*args: Any) -> Any:
        monkeypatch.undo()
        order.append("looked")
        do()
        order.append("finished by another")
        return claimed(*args)

    monkeypatch.setattr(module, "claimed", late)
    return order


@pytest.mark.parametrize("save_every", [4, None])
def test_a_run_that_another_process_finished_meanwhile_is_not_touched(
    save_every: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked for without the lock, then with it: between, a second copy may have done it."""
    config = run_config("digits", "vanilla", 0, **TINY | {"save_every": save_every})
    order = finished_meanwhile(monkeypatch, run_module, lambda: run(config, tmp_path))
    done = run(config, tmp_path)
    assert order == ["looked", "finished by another"]
    assert done.finished
    again = run(config, tmp_path)
    assert again.header["run_id"] == done.header["run_id"]
    assert again.result == done.result


def test_a_run_of_gradient_noise_that_another_process_finished_meanwhile_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_gradient_noise.GradientNoiseConfig(arm="p4", seed=0, width=4, steps=3)
    done: list[Any] = []
    finished_meanwhile(
        monkeypatch,
        run_gradient_noise,
        lambda: done.append(run_gradient_noise.run_gradient_noise(config, tmp_path)),
    )
    assert run_gradient_noise.run_gradient_noise(config, tmp_path) == done[0]


def test_a_run_is_one_threads_at_a_time(tmp_path: Path) -> None:
    """A lock of a process keeps no thread of it out, and another's end would let go of it."""
    with alone(tmp_path):
        with pytest.raises(ValueError, match="another process is at the run in"):
            alone(tmp_path).__enter__()
        with pytest.raises(ValueError, match="another process is at the run in"):
            alone(tmp_path / ".." / tmp_path.name).__enter__()
    with alone(tmp_path):
        pass


def test_a_disk_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with pytest.raises(RecordError, match=r"cannot lock .*No locks available; choose an --out on"):
        run(run_config("digits", "vanilla", 0, **TINY), tmp_path)


@pytest.mark.parametrize("left", ["nothing", "another's run"])
def test_a_folder_that_is_deleted_in_training_is_noticed_at_the_next_line(
    left: str, whole: Run, tmp_path: Path
) -> None:
    """And what another process began there is not written to."""
    config = run_config("digits", "vanilla", 0, **TINY)
    folder = run_path(tmp_path, "vanilla", 0).parent
    other = whole.path.parent

    def delete(step: int) -> None:
        if step == 2:
            shutil.rmtree(folder)
            if left != "nothing":
                shutil.copytree(other, folder)

    with pytest.raises(
        RecordError, match=r"record\.jsonl was (taken away|changed by another) while"
    ):
        run(config, tmp_path, on_step=delete)
    if left == "nothing":
        assert not folder.exists()
    else:
        names = [each.relative_to(other) for each in sorted(other.rglob("*"))]
        assert [each.relative_to(folder) for each in sorted(folder.rglob("*"))] == names
        for name in (each for each in names if (other / each).is_file()):
            assert (folder / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("cut", ["by a line", "in a line", "changed"])
def test_a_record_that_was_cut_is_noticed_and_an_earlier_checkpoint_used(
    cut: str, whole: Run, tmp_path: Path
) -> None:
    config = run_config("digits", "vanilla", 0, **TINY)
    stopped(config, tmp_path / "cut", 11)
    record = run_path(tmp_path / "cut", "vanilla", 0)
    lines = record.read_bytes().splitlines(keepends=True)
    fewer = {"by a line": lines[:-1], "in a line": [*lines[:-1], lines[-1][:40]]}
    changed = [*lines[:-1], lines[-1].replace(b'"loss": ', b'"loss": 1')]
    record.write_bytes(b"".join(fewer.get(cut, changed)))
    said: list[str] = []
    done = run(config, tmp_path / "cut", told=said.append)
    assert "record.jsonl has been cut or changed since it was made; going back to" in said[0]
    assert lines_of(done.path) == lines_of(whole.path)
    assert done.result is not None
    assert done.result["time"]["resumed_at"] == 8


def test_a_record_of_which_too_little_is_left_is_refused_and_nothing_deleted(
    tmp_path: Path,
) -> None:
    config = run_config("digits", "vanilla", 0, **TINY)
    stopped(config, tmp_path, 9)
    record = run_path(tmp_path, "vanilla", 0)
    before = sorted(record.parent.rglob("*"))
    record.write_bytes(record.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(RecordError, match=r"cut or changed .*no earlier one; bring .* back"):
        run(config, tmp_path, told=lambda said: None)
    assert sorted(record.parent.rglob("*")) == before


def test_a_later_checkpoint_of_an_older_run_is_not_gone_on_from(whole: Run, tmp_path: Path) -> None:
    config = run_config("digits", "vanilla", 0, **TINY)
    stopped(config, tmp_path / "new", 5)
    folder = run_path(tmp_path / "new", "vanilla", 0).parent
    shutil.copytree(whole.path.parent / "checkpoint-12", folder / "checkpoint-12")
    said: list[str] = []
    done = run(config, tmp_path / "new", told=said.append)
    assert "checkpoint-12 is refused: record.jsonl" in said[0]
    assert done.result is not None
    assert done.result["time"]["resumed_at"] == 5
    assert lines_of(done.path) == lines_of(whole.path)


def test_what_other_commands_said_of_a_run_goes_when_it_goes_on(tmp_path: Path) -> None:
    """A card or measures of weights that are no longer there."""
    config = run_config("digits", "vanilla", 0, **TINY)
    stopped(config, tmp_path, 3)
    folder = run_path(tmp_path, "vanilla", 0).parent
    for name in ("README.md", "measures.json", "error.txt"):
        (folder / name).write_text("{}")
    run(config, tmp_path)
    assert {"README.md", "measures.json", "error.txt"}.isdisjoint(map(str, folder.iterdir()))
    assert not (folder / "measures.json").exists()
