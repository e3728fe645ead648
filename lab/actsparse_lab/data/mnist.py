"""MNIST from two .npz files: grey images of 28×28 pixels, ten classes (LeCun et al. 1998)."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from actsparse.untrusted import open_regular
from actsparse_lab.data.splits import Splits, TensorRows

TRAIN, TEST = "mnist_train_20k.npz", "mnist_test.npz"
VALIDATION = 0.1  # of the training file
MOST = 2**28  # bytes, unpacked
_SPLIT_SEED = 0

Array = NDArray[np.uint8]


def mnist_splits(folder: str | Path) -> Splits[TensorRows]:
    """MNIST from ``mnist_train_20k.npz`` and ``mnist_test.npz`` in ``folder``.

    Each file holds ``image`` uint8 [N, 28, 28] and ``label`` uint8 [N] of 0 to 9. Items are
    `pixel_values` [1, 28, 28] float32, standardised with the mean and standard deviation of all
    *training* pixels, and `labels` int64. A tenth of the training file is the validation split, by
    a fixed draw; the test file is the test split.

    Raises `ValueError`, naming the file, for one that is missing or damaged, lacks an array or
    holds another kind of it. Nothing is ever unpickled.
    """
    images, labels = _read(Path(folder) / TRAIN)
    test_images, test_labels = _read(Path(folder) / TEST)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    validation, train = np.split(order, [max(1, round(VALIDATION * len(order)))])
    pixels = images[train]
    mean, std = float(pixels.mean()), float(pixels.std())

    def rows(images: Array, labels: Array) -> TensorRows:
        return TensorRows(
            pixel_values=torch.from_numpy((images[:, None].astype(np.float32) - mean) / std),
            labels=torch.from_numpy(labels.astype(np.int64)),
        )

    digest = hashlib.sha256()
    for array in (images, labels, test_images, test_labels):
        digest.update(array.tobytes())
    sizes = {"train": len(train), "validation": len(validation), "test": len(test_labels)}
    return Splits(
        train=rows(pixels, labels[train]),
        validation=rows(images[validation], labels[validation]),
        test=rows(test_images, test_labels),
        info={
            "name": "mnist",
            "source": f"{TRAIN}, {TEST}",
            "sizes": sizes,
            "sha256": digest.hexdigest(),
            "split_seed": _SPLIT_SEED,
            "classes": 10,
            "pixel_mean": mean,
            "pixel_std": std,
        },
    )


def _read(path: Path) -> tuple[Array, Array]:
    """``image`` and ``label`` of one file."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as packed:
            if sum(each.file_size for each in packed.infolist()) > MOST:
                raise ValueError(f"it unpacks to more than {MOST >> 20} MiB")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                if missing := {"image", "label"} - set(arrays.files):
                    raise ValueError(f"it holds {arrays.files}, not {' and '.join(missing)}")
                images, labels = arrays["image"], arrays["label"]
    except Exception as error:  # numpy and zipfile raise many kinds
        said = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(
            f"cannot read {path}: {said}; expected a .npz of image [N, 28, 28] and label [N]"
        ) from error
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28) or len(images) < 2:
        raise ValueError(
            f"{path.name}: image is {images.dtype} {list(images.shape)}, not uint8 [N, 28, 28]"
        )
    if labels.dtype != np.uint8 or labels.shape != images.shape[:1] or labels.max() > 9:
        raise ValueError(
            f"{path.name}: label is {labels.dtype} {list(labels.shape)}, not uint8 "
            f"[{len(images)}] of 0 to 9"
        )
    return images, labels
