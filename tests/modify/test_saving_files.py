"""What was saved is whole, old or new, and is what was saved."""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from actsparse import files, load, save
from actsparse.modify import saving, weights
from tests.modify.test_saving import assert_same, half_trained, rewrite
from tests.zoo.ready import built


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(half_trained("gpt2")[0], tmp_path / "m")


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_as_safetensors_says_it(*args: Any, **kwargs: Any) -> None:
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


def interrupted(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "where", ["weights", "weights, by safetensors", "sidecar", "swap", "two renames", "stop"]
)
def test_a_write_that_fails_leaves_the_old_folder_whole(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, _ = half_trained("gpt2")
    before = copy.deepcopy(model)
    folder = tmp_path / "m"
    save(model, folder)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    error: type[BaseException] = OSError
    if where == "weights":
        monkeypatch.setattr(weights, "save_file", full_disk)
    elif where == "weights, by safetensors":
        monkeypatch.setattr(weights, "save_file", full_disk_as_safetensors_says_it)
    elif where == "sidecar":
        monkeypatch.setattr(Path, "write_text", full_disk)
    elif where == "stop":
        monkeypatch.setattr(weights, "save_file", interrupted)
        error = KeyboardInterrupt
    elif where == "swap":
        monkeypatch.setattr(files, "_exchange", full_disk)
    else:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
        real = os.rename

        def into_place_fails(source: Path, target: Path) -> None:
            if source.name == "new":
                full_disk()
            real(source, target)

        monkeypatch.setattr(os, "rename", into_place_fails)
    with pytest.raises(error) as caught:
        save(model, folder)
    monkeypatch.undo()
    if error is OSError:
        assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert_same(before, load(folder), inputs)


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_torn_weights_say_so(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was saved: its SHA-256"):
        load(folder)
    without_digests(folder)
    with pytest.raises(ValueError, match=r"model\.safetensors.*header"):
        load(folder)


def test_a_flipped_bit_of_the_weights_is_noticed(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"is not what was saved"):
        load(folder)


def test_a_folder_without_digests_as_older_versions_wrote_it_loads(folder: Path) -> None:
    before = load(folder)
    without_digests(folder)
    assert_same(before, load(folder), built("gpt2")[1])


@pytest.mark.parametrize("digests", [None, {}, [], {"model.safetensors": None}], ids=str)
def test_digests_that_make_no_sense_are_refused(folder: Path, digests: Any) -> None:
    rewrite(folder, sha256=digests)
    with pytest.raises(ValueError, match=r"sha256.? (must be|is)|is not what was saved"):
        load(folder)


def test_a_folder_that_is_saved_anew_while_it_is_loaded_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the recipe and the schedules of one model would come with the weights of another."""
    other, _, _ = half_trained("gpt2")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    read = saving.read_weights

    def late(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        save(other, folder)
        return read(*args, **options)

    monkeypatch.setattr(saving, "read_weights", late)
    with pytest.raises(ValueError, match="was saved anew while it was loaded; load it again"):
        load(folder)
    assert_same(other, load(folder), built("gpt2")[1])


def without_digests(folder: Path) -> None:
    file = folder / "actsparse.json"
    sidecar = json.loads(file.read_text())
    del sidecar["sha256"]
    file.write_text(json.dumps(sidecar))
