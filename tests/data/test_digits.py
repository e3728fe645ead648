from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from actsparse_lab.data import Splits, TensorRows, load_digits_splits


@pytest.fixture(scope="module")
def splits() -> Splits[TensorRows]:
    return load_digits_splits()


def raw_pixels(rows: TensorRows, info: dict[str, float]) -> np.ndarray:
    pixels = rows.columns["pixel_values"].double() * info["pixel_std"] + info["pixel_mean"]
    return pixels.round().to(torch.uint8).flatten(1).numpy()


def test_items_are_what_a_trainer_expects(splits: Splits[TensorRows]) -> None:
    for part in (splits.train, splits.validation, splits.test):
        item = part[0]
        assert item["pixel_values"].shape == (1, 8, 8)
        assert item["pixel_values"].dtype == torch.float32
        assert item["labels"].shape == ()
        assert item["labels"].dtype == torch.int64


def test_splits_share_no_image_and_lose_none(splits: Splits[TensorRows]) -> None:
    from sklearn.datasets import load_digits

    parts = (splits.train, splits.validation, splits.test)
    together = np.concatenate([raw_pixels(part, splits.info) for part in parts])
    original = load_digits().images.reshape(-1, 64).astype(np.uint8)
    # No two of the 1797 images are equal, so sorted rows show both at once.
    assert len(np.unique(original, axis=0)) == len(original)
    np.testing.assert_array_equal(np.unique(together, axis=0), np.unique(original, axis=0))
    assert len(together) == len(original)


def test_every_class_is_in_every_split_in_its_share(splits: Splits[TensorRows]) -> None:
    for part in (splits.train, splits.validation, splits.test):
        share = torch.bincount(part.columns["labels"], minlength=10) / len(part)
        assert (share - 0.1).abs().max() < 0.01


def test_pixels_are_standardised_with_training_statistics(splits: Splits[TensorRows]) -> None:
    train = splits.train.columns["pixel_values"].double()
    assert abs(train.mean().item()) < 1e-6
    assert abs(train.std(correction=0).item() - 1) < 1e-6
    test = splits.test.columns["pixel_values"].double()
    assert abs(test.mean().item()) > 1e-4  # its own mean would have given zero


def test_the_split_is_the_same_each_time_and_another_for_another_seed(
    splits: Splits[TensorRows],
) -> None:
    again, other = load_digits_splits(), load_digits_splits(seed=1)
    labels = splits.test.columns["labels"]
    assert torch.equal(again.test.columns["labels"], labels)
    assert not torch.equal(other.test.columns["labels"], labels)
    assert again.info == splits.info
    assert other.info["sha256"] == splits.info["sha256"]


def test_without_scikit_learn_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        load_digits_splits()


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="same length"):
        TensorRows(a=torch.zeros(3), b=torch.zeros(4))
    with pytest.raises(ValueError, match="must exist"):
        TensorRows()
