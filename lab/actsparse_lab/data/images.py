"""Labelled images in files, for vision transformers: folders of classes, or Hugging Face tables.

Training data are addressed by position (`Stream`): what stands at position p of the whole training
is a function of p and the seed alone, so any worker, process or resumed run sees the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from actsparse.untrusted import MIB, check_regular, read_bytes
from actsparse_lab.data.augment import IMAGENET_MEAN, IMAGENET_STD, ITEM, Box, Stream, View
from actsparse_lab.data.splits import Splits

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

T = TypeVar("T")
Progress = Callable[[int, int], None]  # (done, of how many)

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
LARGEST = 256 * MIB  # of a file
PIXELS = 2**26  # what takes a quarter of a GiB in RGBA
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class FolderPictures:
    """Images in files below `root`, named relative to it, `/` between the parts."""

    def __init__(self, root: Path, names: list[str], labels: list[int]) -> None:
        # One array: a list of a million strings is copied into every worker, as it is read.
        self.root, self.names = root, np.array([os.fsencode(name) for name in names])
        self.labels = np.array(labels, dtype=np.int64)

    def name(self, index: int) -> str:
        """What messages call it, and what decides whether it is held out."""
        return os.fsdecode(self.names[index])

    def open(self, index: int) -> Picture:
        """Pillow's lazy image: nothing is decoded yet."""
        return opened(io.BytesIO(read_bytes(self.root / self.name(index), LARGEST)))


class TablePictures:
    """Rows of a `datasets.Dataset` whose `column` holds {bytes, path}."""

    def __init__(self, table: Any, split: str, column: str, labels: NDArray[np.int64]) -> None:
        self.table, self.split, self.column, self.labels = table, split, column, labels

    def name(self, index: int) -> str:
        """What messages call it, and what decides whether it is held out."""
        return f"{self.split}/{index}"

    def open(self, index: int) -> Picture:
        """Pillow's lazy image: nothing is decoded yet."""
        content = self.table[int(index)][self.column]["bytes"]
        if content is None:
            raise OSError("the table holds no bytes for it")
        return opened(io.BytesIO(content))


def opened(content: BinaryIO) -> Picture:
    """Pillow's lazy image, of the formats that a decoder of its own reads, and not too large.

    Left to itself Pillow goes by what a file says, not by its name: for PostScript it starts
    Ghostscript.

    Raises:
        OSError: another format, or more than `PIXELS` pixels.
    """
    from PIL import Image

    image = Image.open(content, formats=FORMATS)
    if image.width * image.height > PIXELS:
        raise OSError(f"{image.width} × {image.height} pixels, more than {PIXELS:,}")
    return image


Pictures = FolderPictures | TablePictures


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
    found = _read_tables(root) or _read_folders(root)
    if classes is not None and classes != found.classes:
        raise ValueError(f"classes={classes}, but {root.name} has {found.classes}")
    parts = {split: (one, np.arange(len(one.labels))) for split, one in found.pictures.items()}
    if len(parts) == 2:
        train, _ = parts.pop("train")
        out = _held_out(train, held_out)
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


@dataclass(frozen=True)
class _Found:
    pictures: dict[str, Pictures]  # train, and one or two more of SPLITS, in that order
    classes: int
    class_names: list[str] | None
    digest: str


def _read_folders(root: Path) -> _Found:
    folders = _by_split(root, {entry.name: entry for entry in root.iterdir() if entry.is_dir()})
    class_names: list[str] = []
    files: list[tuple[str, int]] = []
    pictures: dict[str, Pictures] = {}
    for split, folder in folders.items():
        below = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")
        if not below:
            raise ValueError(f"{folder.name}/ has no class folders, as in {folder.name}/cat/1.jpg")
        class_names = class_names or below
        if strange := sorted(set(below) - set(class_names)):
            raise ValueError(f"{folder.name}/ has classes that train/ has not: {strange[:5]}")
        start, labels = len(files), []
        for name in below:
            images = sorted(
                # a broken link has no size; whoever reads it will name it
                (f"{folder.name}/{name}/{e.name}", e.stat().st_size if e.is_file() else 0)
                for e in os.scandir(folder / name)
                if e.name.lower().endswith(SUFFIXES) and e.name[0] != "."
            )
            if not images:
                raise ValueError(f"{folder.name}/{name}/ has no images ({' '.join(SUFFIXES)})")
            files += images
            labels += [class_names.index(name)] * len(images)
        pictures[split] = FolderPictures(root, [name for name, _ in files[start:]], labels)
    return _Found(pictures, len(class_names), class_names, _digest(files))


def _read_tables(root: Path) -> _Found | None:
    """Parquet files or a saved `DatasetDict`; None where there is neither."""
    saved = (root / "dataset_dict.json").exists()
    patterns = ["*/*.arrow"] if saved else ["*.parquet", "*/*.parquet"]
    files = sorted(file for pattern in patterns for file in root.glob(pattern))
    if not (saved or files):
        return None
    import datasets

    for file in [*files, *root.glob("*.json"), *root.glob("*/*.json")]:
        check_regular(file)
    shards = {} if saved else _shards(root, files)
    try:
        tables = (
            datasets.load_dataset("parquet", data_files=shards)
            if shards
            else datasets.load_from_disk(str(root))
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{root.name}: a table is damaged or missing ({type(error).__name__}, see above)"
        ) from error
    pictures: dict[str, Pictures] = {}
    class_names, known = None, np.array([])
    for split, table in _by_split(root, tables).items():
        column = next((name for name in ("image", "img") if name in table.column_names), None)
        if column is None or "label" not in table.column_names:
            raise ValueError(
                f"{root.name}: {split} has columns {table.column_names}, not image (img) and label"
            )
        class_names = class_names or getattr(table.features["label"], "names", None)
        labels = np.asarray(table.with_format("numpy")["label"][:])
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{root.name}: labels of {split} are {labels.dtype}, not integers")
        if split == "test" and (labels == -1).all():
            continue
        known = np.unique(labels) if split == "train" else known
        if len(strange := np.setdiff1d(labels, known[known >= 0])):
            raise ValueError(f"{root.name}: {split} has labels {strange[:5]} that train has not")
        table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        pictures[split] = TablePictures(table, split, column, labels.astype(np.int64))
    _by_split(root, pictures)  # enough of them must have labels
    sizes = [(file.relative_to(root).as_posix(), file.stat().st_size) for file in files]
    classes = len(class_names) if class_names else int(known[-1]) + 1
    return _Found(pictures, classes, class_names, _digest(sizes))


def _shards(root: Path, files: list[Path]) -> dict[str, list[str]]:
    """Parquet files by split: `train-00000-of-00002.parquet`, or `train/<anything>.parquet`."""
    found: dict[str, list[Path]] = {}
    for file in files:
        named = re.match(r"(train|validation|valid|val|test)(?![a-z])", file.stem)
        found.setdefault(named[1] if named else file.parent.name, []).append(file)
    splits = _by_split(root, found)
    for split, shards in splits.items():
        if len({file.parent for file in shards}) > 1:
            raise ValueError(f"{root.name}: parquet files of {split} lie in more than one folder")
        numbers = [re.search(r"-(\d+)-of-(\d+)$", file.stem) for file in shards]
        if first := numbers[0]:
            here = {int(number[1]) for number in numbers if number}
            if missing := sorted(set(range(int(first[2]))) - here):
                raise ValueError(f"{root.name}: {split} lacks shards {missing[:5]} of {first[2]}")
    return {split: [str(file) for file in shards] for split, shards in splits.items()}


def _by_split(root: Path, found: Mapping[str, T]) -> dict[str, T]:
    """What was found, by our names of the splits, train first."""
    chosen = {}
    for split, names in SPLITS.items():
        here = [name for name in names if name in found]
        if len(here) > 1:
            raise ValueError(f"{root.name} has {' and '.join(here)}: which one is {split}?")
        if here:
            chosen[split] = found[here[0]]
    if "train" not in chosen or len(chosen) < 2:
        raise ValueError(
            f"{root.name} holds {sorted(found)[:8]}: expected train and validation (or val) or "
            "test, as folders of class folders, parquet files or a DatasetDict saved to disk"
        )
    return chosen


def _held_out(pictures: Pictures, share: float) -> NDArray[np.bool_]:
    """The images whose name's hash is among the lowest `share` of all hashes; at least one."""
    names = (os.fsencode(pictures.name(index)) for index in range(len(pictures.labels)))
    hashes = np.fromiter(
        (int.from_bytes(hashlib.sha256(name).digest()[:8], "big") for name in names), np.uint64
    )
    return hashes <= max(int(share * 2**64), int(hashes.min()))


def _digest(files: list[tuple[str, int]]) -> str:
    digest = hashlib.sha256()
    for name, size in sorted(files):
        digest.update(os.fsencode(f"{name}\0{size}\n"))
    return digest.hexdigest()
