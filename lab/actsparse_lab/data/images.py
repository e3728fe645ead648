"""Labelled images in files, for vision transformers: folders of classes, or Hugging Face tables.

Training data are addressed by position (`Stream`): what stands at position p of the whole training
is a function of p and the seed alone, so any worker, process or resumed run sees the same.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from actsparse_lab.data.augment import IMAGENET_MEAN, IMAGENET_STD, ITEM, Box, Stream, View
from actsparse_lab.data.pictures import Pictures, hash_held_out, read_folders, read_tables
from actsparse_lab.data.splits import Splits

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Progress = Callable[[int, int], None]  # (done, of how many)


class ImageRows(Dataset[dict[str, Tensor]]):
    """Images as a model takes them: ``pixel_values`` [3, size, size] float32, ``labels`` int64.

    Item i is image ``chosen[i]`` as `view` evaluates it. An image that cannot be read is a
    `ValueError` with its name; a JPEG with wrong bits in the middle still decodes, wrongly.
    """

    def __init__(self, pictures: Pictures, chosen: NDArray[np.int64], view: View) -> None:
        self.pictures, self.chosen, self.view = pictures, chosen, view

    def name(self, index: int) -> str:
        """The file's relative name, or the table's split and row."""
        return self.pictures.name(self.chosen[index])

    def augmented(self, index: int, draw: tuple[int, int]) -> dict[str, Tensor]:
        """Item `index` as training shows it at `draw`, (seed, position), and nothing else."""
        return self._item(index, np.random.default_rng([ITEM, *draw]))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._item(index, None)

    def _item(self, index: int, rng: np.random.Generator | None) -> dict[str, Tensor]:
        index = range(len(self))[index]
        image, box = self.decode(index, lambda w, h: self.view.box(w, h, rng), self.view.size)
        return {
            "pixel_values": self.view.pixels(image, box, rng),
            "labels": torch.tensor(self.pictures.labels[self.chosen[index]]),
        }

    def decode(
        self, index: int, box_of: Callable[[int, int], Box], size: int
    ) -> tuple[Picture, Box]:
        """Image `index` in RGB, and where in it ``box_of(width, height)`` lies.

        A JPEG is decoded at 1/2, 1/4 or 1/8 when the box then still has twice `size` pixels.
        """
        try:
            with self.pictures.open(self.chosen[index]) as image:
                width, height = image.size
                box = box_of(width, height)
                least = width * 2 * size / (box[2] - box[0]), height * 2 * size / (box[3] - box[1])
                if drafted := image.draft(None, (math.ceil(least[0]), math.ceil(least[1]))):
                    left, top, right, bottom = (edge * drafted[1][2] / width for edge in box)
                    box = (left, top, right, bottom)
                if image.mode[0] in "IF":  # Pillow would turn nearly all of it white
                    raise TypeError(f"mode {image.mode} has more than 8 bits a channel")
                if "transparency" in image.info:
                    image = image.convert("RGBA")
                return image.convert("RGB"), box
        except Exception as error:  # broken files make Pillow raise many kinds
            raise ValueError(
                f"{self.name(index)} cannot be read as an image ({type(error).__name__}): repair "
                'or remove it, or leave out all such images beforehand with damaged="skip"'
            ) from error

    def damaged(self, progress: Progress | None = None) -> list[int]:
        """Indices of the images that cannot be read. Decodes all, in as many threads as cores.

        JPEGs at 1/8, which still reads all their bytes: Pillow's `verify` looks at a JPEG's header
        only and passes truncated ones. `progress(done, of)` is called as it goes.
        """
        found = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(self), 1024):
                block = range(start, min(start + 1024, len(self)))
                readable = list(pool.map(self._readable, block))
                found += [index for index in block if not readable[index - start]]
                if progress is not None:
                    progress(block.stop, len(self))
        return found

    def _readable(self, index: int) -> bool:
        try:
            self.decode(index, lambda w, h: (0, 0, w, h), size=1)
        except ValueError:
            return False
        return True


def image_splits(
    path: str | Path,
    *,
    steps: int,
    batch: int,
    seed: int,
    size: int = 224,
    classes: int | None = None,
    repeats: int = 1,
    randaugment: tuple[int, float] | None = (2, 9),
    crop: tuple[float, float] | int | None = (0.08, 1.0),
    flip: bool = True,
    held_out: float = 0.01,
    damaged: Literal["refuse", "skip"] = "refuse",
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    progress: Progress | None = None,
) -> Splits[Stream | ImageRows]:
    """Labelled images below `path`: train is a `Stream` of steps · batch positions.

    Layouts: ``train/<class>/<image>`` and ``val/<class>/<image>`` (also validation, valid, test);
    parquet files as the Hugging Face Hub has them (``train-00000-of-00294.parquet``, in `path` or
    one folder below; columns image or img, and label), which `datasets` copies into its cache
    once; a `DatasetDict` that was saved to disk. With three splits all are as they are. With two,
    the held-out one is test, and validation is about `held_out` of the training images, at least
    one, picked by a hash of the name (in tables, of the row): the same in every run. A table's
    test split of labels −1, such as ImageNet's, counts as absent. Grey, CMYK and palette images
    become RGB, transparency is dropped.

    `size`, `crop`, `flip`, `randaugment`, `mean`, `std` are `View`'s, `repeats` is `Stream`'s.
    `classes` is how many there should be. An unreadable image ends the run that meets it, by name;
    with ``damaged="skip"`` all images are decoded beforehand, with `progress(done, of)` for each
    split, and the unreadable ones are left out and counted in `info`.
    `info["bounds"]` are black and white as `mean` and `std` make them, each [3, 1, 1]. The `sha256`
    is over the sorted (relative name, size in bytes) of all files: reading all would take an hour.

    Raises `ValueError` for a layout that is none of these, for splits, shards or images that are
    missing, an empty class, and classes or labels that training does not have.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for place in ("train/cat", "train/dog", "val/cat", "val/dog"):
    ...         (Path(folder) / place).mkdir(parents=True)
    ...         for number in range(3):
    ...             Image.new("RGB", (12, 10)).save(Path(folder) / place / f"{number}.png")
    ...     splits = image_splits(folder, size=8, steps=5, batch=4, seed=0)
    ...     splits.train[19]["pixel_values"].shape, splits.info["sizes"]
    (torch.Size([3, 8, 8]), {'train': 5, 'validation': 1, 'test': 6})
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} is a share of the training images, within 0 and 1")
    if damaged not in ("refuse", "skip"):
        raise ValueError(f'damaged={damaged!r} must be "refuse" or "skip"')
    view = View(size, crop, flip, randaugment, mean, std)
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder: expected one with train/ and val/, or tables")
    root = root.absolute()  # "." has no name
    found = read_tables(root) or read_folders(root)
    if classes is not None and classes != found.classes:
        raise ValueError(f"classes={classes}, but {root.name} has {found.classes}")
    parts = {split: (one, np.arange(len(one.labels))) for split, one in found.pictures.items()}
    if len(parts) == 2:
        train, _ = parts.pop("train")
        out = hash_held_out(train, held_out)
        parts = {
            "train": (train, np.flatnonzero(~out)),
            "validation": (train, np.flatnonzero(out)),
            "test": parts.popitem()[1],
        }
    rows, left_out = {}, []
    for split, (pictures, chosen) in parts.items():
        rows[split] = ImageRows(pictures, chosen, view)
        if damaged == "skip":
            bad = rows[split].damaged(progress)
            left_out += [rows[split].name(index) for index in bad]
            rows[split] = ImageRows(pictures, np.delete(chosen, bad), view)
        if not len(rows[split]):
            raise ValueError(f"{root.name}: no image is left for {split}")
    centre, spread = (torch.tensor(three)[:, None, None] for three in (mean, std))
    info = {
        "name": "images",
        "source": root.name,
        "sizes": {split: len(part) for split, part in rows.items()},
        "sha256": found.digest,
        "positions": steps * batch,
        "repeats": repeats,
        "order_seed": seed,
        "classes": found.classes,
        "view": asdict(view),
        "bounds": [((value - centre) / spread).tolist() for value in (0.0, 1.0)],
        "damaged": {"policy": damaged, "left_out": len(left_out), "names": left_out[:100]},
    }
    if found.class_names and found.classes <= 100:
        info["class_names"] = found.class_names
    stream = Stream(rows["train"], steps * batch, batch=batch, seed=seed, repeats=repeats)
    info = json.loads(json.dumps(info))  # tuples become lists, as they will in the record
    return Splits(stream, rows["validation"], rows["test"], info)
