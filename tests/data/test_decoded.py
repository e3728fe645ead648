"""Images in memory against the same images read one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from actsparse_lab.data import decoded_image_splits, image_splits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for split, each in (("train", 12), ("val", 3)):
        for name in ("cat", "dog"):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for number in range(each):
                pixels = draw.integers(0, 256, (9, 11, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return tmp_path


def test_every_image_is_that_of_evaluation(folder: Path) -> None:
    """Nothing is cropped by the margin, flipped or drawn; training rows are each there once."""
    splits = decoded_image_splits(folder, size=8, held_out=0.2)
    plain = image_splits(folder, steps=1, batch=1, seed=5, size=8, held_out=0.2, crop=4)
    for rows, want in (
        (splits.train, plain.train.rows),  # type: ignore[union-attr]
        (splits.validation, plain.validation),
        (splits.test, plain.test),
    ):
        assert len(rows) == len(want) > 0
        for index in range(len(rows)):
            assert torch.equal(rows[index]["pixel_values"], want[index]["pixel_values"])
            assert torch.equal(rows[index]["labels"], want[index]["labels"])
    assert splits.info["sizes"] == plain.info["sizes"]
    assert splits.info["sha256"] == plain.info["sha256"]
    assert splits.info["classes"] == 2


def test_a_second_call_decodes_nothing(folder: Path) -> None:
    first = decoded_image_splits(folder, size=8)
    assert decoded_image_splits(str(folder), size=8) is first
    assert decoded_image_splits(folder, size=4) is not first


def test_what_training_does_to_images_is_not_among_the_settings(folder: Path) -> None:
    with pytest.raises(ValueError, match="no folder"):
        decoded_image_splits(folder / "nowhere")
    with pytest.raises(ValueError, match="crop=4: decoded images are not augmented"):
        decoded_image_splits(folder, crop=4)
