"""Pictures in files: folders of classes, or Hugging Face tables; read, named and opened."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from actsparse.untrusted import MIB, check_regular, read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

T = TypeVar("T")

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


@dataclass(frozen=True)
class Found:
    """What a folder of images holds."""

    pictures: dict[str, Pictures]  # train, and one or two more of SPLITS, in that order
    classes: int
    class_names: list[str] | None
    digest: str


def read_folders(root: Path) -> Found:
    """The images of ``train/<class>/<image>`` and the like.

    Raises:
        ValueError: splits or classes are missing or strange.
    """
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
    return Found(pictures, len(class_names), class_names, _digest(files))


def read_tables(root: Path) -> Found | None:
    """The images of Hugging Face tables, or None where there are none.

    Raises:
        ValueError: shards, columns or labels are missing or strange.
    """
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
    return Found(pictures, classes, class_names, _digest(sizes))


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


def hash_held_out(pictures: Pictures, share: float) -> NDArray[np.bool_]:
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
