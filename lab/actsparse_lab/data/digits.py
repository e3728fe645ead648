"""Scikit-learn's handwritten digits: 1797 grey images of 8×8 pixels, ten classes, no download."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from actsparse_lab.data.splits import Splits, TensorRows

HELD_OUT = 300  # images in validation, and again in test
PIXELS = (0, 16)  # from black to white


def load_digits_splits(seed: int = 0) -> Splits[TensorRows]:
    """Digits as 1197 / 300 / 300 items of `pixel_values` [1, 8, 8] float32 and `labels` int64.

    The split is stratified by class. `seed` chooses the split and nothing else: leave it alone
    and pass a run's seed elsewhere, so that all runs are scored on the same images. Pixels (0 to
    16) are standardised with the mean and standard deviation of all *training* pixels;
    `info["bounds"]` are the least and the greatest value then possible.

    Raises `ModuleNotFoundError` when scikit-learn is not installed.

    >>> splits = load_digits_splits()
    >>> splits.info["sizes"]
    {'train': 1197, 'validation': 300, 'test': 300}
    >>> splits.train[0]["pixel_values"].shape
    torch.Size([1, 8, 8])
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn: pip install scikit-learn"
        ) from error

    raw = load_digits()
    images = raw.images.astype(np.float32)[:, None]
    labels = raw.target.astype(np.int64)
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=seed
    )
    train, validation = train_test_split(
        rest, test_size=HELD_OUT, stratify=labels[rest], random_state=seed
    )
    mean, std = float(images[train].mean()), float(images[train].std())

    def standardised(pixels: np.ndarray) -> np.ndarray:
        return (pixels - mean) / std

    def rows(index: np.ndarray) -> TensorRows:
        return TensorRows(
            pixel_values=torch.from_numpy(standardised(images[index])),
            labels=torch.from_numpy(labels[index]),
        )

    return Splits(
        train=rows(train),
        validation=rows(validation),
        test=rows(test),
        info={
            "name": "digits",
            "source": "sklearn.datasets.load_digits",
            "sizes": {"train": len(train), "validation": len(validation), "test": len(test)},
            "sha256": hashlib.sha256(
                images.astype(np.uint8).tobytes() + labels.astype(np.uint8).tobytes()
            ).hexdigest(),
            "split_seed": seed,
            "classes": 10,
            "pixel_mean": mean,
            "pixel_std": std,
            "bounds": standardised(np.array(PIXELS, dtype=np.float32)).tolist(),
        },
    )
