"""Images that lie in one .npz as JPEGs, as folders: what `vit_cifar10` was run on here.

``python benchmarks/unpack_images.py TRAIN.npz TEST.npz FOLDER`` writes ``FOLDER/train/<class>/``,
``FOLDER/val/<class>/``. An .npz holds ``jpeg`` (uint8, all files one after another), ``offset``
[N + 1], ``label`` [N] and ``classes``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def unpack(file: str, folder: Path) -> int:
    with np.load(file, allow_pickle=False) as data:
        jpeg, offset, label = (data[name] for name in ("jpeg", "offset", "label"))
        classes = [str(name) for name in data["classes"]]
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (start, stop, own) in enumerate(zip(offset, offset[1:], label, strict=False)):
        (folder / classes[own] / f"{number:05d}.jpg").write_bytes(jpeg[start:stop].tobytes())
    return len(label)


if __name__ == "__main__":
    train, test, folder = sys.argv[1:]
    for name, file in (("train", train), ("val", test)):
        print(f"{name}: {unpack(file, Path(folder, name))} images")
