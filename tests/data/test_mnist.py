from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actsparse_lab.data.mnist import TEST, TRAIN, mnist_splits


def arrays(n: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (n, 28, 28), dtype=np.uint8),
        "label": (np.arange(n) % 10).astype(np.uint8),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.savez(tmp_path / TRAIN, **arrays(40, seed=0))  # type: ignore[arg-type]
    np.savez_compressed(tmp_path / TEST, **arrays(12, seed=1))  # type: ignore[arg-type]
    return tmp_path


def test_splits_share_no_image_and_lose_none(folder: Path) -> None:
    splits = mnist_splits(folder)
    assert splits.info["sizes"] == {"train": 36, "validation": 4, "test": 12}
    mean, std = splits.info["pixel_mean"], splits.info["pixel_std"]
    found = torch.cat([part.columns["pixel_values"] for part in (splits.train, splits.validation)])
    raw = (found.double() * std + mean).round().to(torch.uint8).flatten(1).numpy()
    original = arrays(40, seed=0)
    labels = torch.cat([part.columns["labels"] for part in (splits.train, splits.validation)])
    row_of = {image.tobytes(): index for index, image in enumerate(original["image"])}
    order = [row_of[image.tobytes()] for image in raw]
    assert sorted(order) == list(range(40))
    assert labels.tolist() == original["label"][order].tolist()
    assert splits.test.columns["labels"].tolist() == arrays(12, seed=1)["label"].tolist()


def test_items_are_standardised_with_training_statistics(folder: Path) -> None:
    splits = mnist_splits(folder)
    item = splits.train[0]
    assert (item["pixel_values"].shape, item["pixel_values"].dtype) == ((1, 28, 28), torch.float32)
    assert (item["labels"].shape, item["labels"].dtype) == ((), torch.int64)
    pixels = splits.train.columns["pixel_values"].double()
    assert abs(pixels.mean().item()) < 1e-6  # float32 of values up to 2
    assert abs(pixels.std(correction=0).item() - 1) < 1e-6


def test_the_digest_is_of_every_pixel_and_label(folder: Path) -> None:
    before = mnist_splits(folder).info["sha256"]
    assert mnist_splits(folder).info["sha256"] == before
    other = arrays(12, seed=1)
    other["image"][-1, -1, -1] ^= 1
    np.savez(folder / TEST, **other)  # type: ignore[arg-type]
    assert mnist_splits(folder).info["sha256"] != before


class Mischief:
    """Unpickled, it raises."""

    def __reduce__(self) -> Any:
        return (exec, ("raise RuntimeError('a stranger’s file was unpickled')",))


def npz(**changed: Any) -> bytes:
    file = io.BytesIO()
    both = {**arrays(12, seed=1), **changed}
    np.savez(file, **{name: value for name, value in both.items() if value is not None})
    return file.getvalue()


def broken() -> bytes:
    """Compressed data with bytes changed in the middle."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays(12, seed=1))  # type: ignore[arg-type]
    data = bytearray(file.getvalue())
    data[2000:2100] = bytes(100)
    return bytes(data)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        pytest.param(lambda: npz(label=None), "not label", id="no label"),
        pytest.param(
            lambda: npz(image=np.zeros((12, 28, 28))), r"float64 \[12, 28, 28\]", id="float"
        ),
        pytest.param(
            lambda: npz(image=np.zeros((12, 784), np.uint8)), r"uint8 \[12, 784\]", id="flat"
        ),
        pytest.param(
            lambda: npz(label=np.zeros(11, np.uint8)), r"label is uint8 \[11\]", id="one less"
        ),
        pytest.param(
            lambda: npz(label=np.full(12, 10, np.uint8)), "of 0 to 9", id="eleventh class"
        ),
        pytest.param(
            lambda: npz(image=np.array([Mischief()], dtype=object)), "allow_pickle", id="objects"
        ),
        pytest.param(lambda: pickle.dumps(Mischief()), "not a zip file", id="pickle"),
        pytest.param(lambda: npz()[:-100], "not a zip file", id="cut off"),
        pytest.param(broken, "cannot read", id="damaged"),
        pytest.param(lambda: b"", "not a zip file", id="empty"),
    ],
)
def test_a_file_that_is_something_else_is_named(
    make: Callable[[], bytes], said: str, folder: Path
) -> None:
    (folder / TEST).write_bytes(make())
    with pytest.raises(ValueError, match=said) as caught:
        mnist_splits(folder)
    assert TEST in str(caught.value)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / TRAIN).unlink()
    with pytest.raises(ValueError, match=rf"cannot read .*{TRAIN}: No such file"):
        mnist_splits(folder)
