from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from actsparse_lab.data.augment import Mixed, View
from actsparse_lab.data.images import ImageRows, image_splits
from actsparse_lab.data.pictures import FolderPictures

SIZES = [(8, 8), (40, 30), (30, 64), (12, 9)]


def picture(number: int) -> Image.Image:
    """Colour and shape tell images apart."""
    colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
    return Image.new("RGB", SIZES[number % len(SIZES)], colour)


def content(number: int, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(number).save(file, format)
    return file.getvalue()


def plant(root: Path, tree: dict[str, int]) -> Path:
    """`{"train/cat": 3}` becomes three images in that folder, their numbers counted on."""
    number = 0
    for folder, count in tree.items():
        (root / folder).mkdir(parents=True)
        for _ in range(count):
            suffix = ("png", "JPEG", "bmp")[number % 3]
            picture(number).save(root / folder / f"{number:03}.{suffix}")
            number += 1
    return root


def read(root: Path, **other: Any) -> Any:
    return image_splits(root, **{"size": 8, "steps": 4, "batch": 4, "seed": 0, **other})


def names(rows: ImageRows) -> list[str]:
    return [rows.name(index) for index in range(len(rows))]


PLAIN = {"train/cat": 6, "train/dog": 5, "val/cat": 2, "val/dog": 3}


def test_two_folders_become_three_splits_and_nothing_is_in_two(tmp_path: Path) -> None:
    splits = read(plant(tmp_path / "pets", PLAIN), held_out=0.3)
    parts = [names(splits.train.rows), names(splits.validation), names(splits.test)]
    files = sorted(
        file.relative_to(tmp_path / "pets").as_posix()
        for file in (tmp_path / "pets").glob("*/*/*.*")
    )
    assert sorted(name for part in parts for name in part) == files
    assert all(name.startswith("train/") for name in parts[0] + parts[1])
    assert all(name.startswith("val/") for name in parts[2])
    assert min(map(len, parts)) > 0
    for rows in (splits.train.rows, splits.validation, splits.test):
        for index, name in enumerate(names(rows)):
            item = rows[index]
            assert item["pixel_values"].shape == (3, 8, 8)
            assert item["labels"].dtype == torch.int64
            assert item["labels"] == ["cat", "dog"].index(name.split("/")[1])


def test_labels_are_trainings_also_where_a_class_is_not_held_out(tmp_path: Path) -> None:
    splits = read(plant(tmp_path, {"train/cat": 2, "train/dog": 2, "val/dog": 1}))
    assert splits.test[0]["labels"] == 1


def test_info_is_ready_for_a_record_and_names_no_place(tmp_path: Path) -> None:
    info = read(plant(tmp_path / "pets", PLAIN), repeats=2).info
    assert json.loads(json.dumps(info)) == info
    assert str(tmp_path) not in json.dumps(info)
    assert info["name"] == "images"
    assert info["source"] == "pets"
    assert sum(info["sizes"].values()) == 16
    assert (info["classes"], info["class_names"]) == (2, ["cat", "dog"])
    assert (info["positions"], info["repeats"]) == (16, 2)
    assert info["view"]["randaugment"] == [2, 9]
    assert info["damaged"] == {"policy": "refuse", "left_out": 0, "names": []}


def test_the_digest_sees_names_and_sizes_but_not_the_place(tmp_path: Path) -> None:
    digest = read(plant(tmp_path / "a", PLAIN)).info["sha256"]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert read(tmp_path / "b").info["sha256"] == digest
    with (tmp_path / "b/train/cat/000.png").open("ab") as file:
        file.write(b"x")
    assert read(tmp_path / "b").info["sha256"] != digest


def test_held_out_images_stay_held_out_whatever_is_added(tmp_path: Path) -> None:
    root = plant(tmp_path, {"train/cat": 60, "val/cat": 1})
    before = set(names(read(root, held_out=0.2, seed=1).validation))
    assert 2 <= len(before) <= 30  # binomial(60, 0.2): outside with less than 1e-5
    for number in range(20):
        picture(number).save(root / "train/cat" / f"new{number}.png")
    after = set(names(read(root, held_out=0.2).validation))
    assert {name for name in after if "new" not in name} == before
    assert len(names(read(root, held_out=1e-9).validation)) == 1


@pytest.mark.parametrize("held_name", ["val", "valid", "validation"])
def test_three_folders_stay_as_they_are(tmp_path: Path, held_name: str) -> None:
    splits = read(plant(tmp_path, {"train/a": 3, f"{held_name}/a": 2, "test/a": 1}))
    assert splits.info["sizes"] == {"train": 3, "validation": 2, "test": 1}
    assert all(name.startswith(f"{held_name}/") for name in names(splits.validation))


def features(class_names: list[str] | None, column: str = "image") -> Any:
    import datasets

    label = datasets.ClassLabel(names=class_names) if class_names else datasets.Value("int64")
    return datasets.Features({column: datasets.Image(), "label": label})


def table(labels: list[int], class_names: list[str] | None = None, column: str = "image") -> Any:
    import datasets

    images = [{"bytes": content(number), "path": None} for number in range(len(labels))]
    rows = {column: images, "label": labels}
    return datasets.Dataset.from_dict(rows, features=features(class_names, column))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "tables"


def check_numbers(rows: ImageRows, numbers: list[int]) -> None:
    view = View(size=8)
    for index, number in enumerate(numbers):
        expected = view.pixels(picture(number), view.box(*picture(number).size))
        assert torch.equal(rows[index]["pixel_values"], expected)


def test_parquet_as_cifar_on_the_hub_has_it(cache: Path) -> None:
    (cache / "plain_text").mkdir(parents=True)
    classes = ["plane", "car", "bird"]
    for split, count in (("train", 30), ("test", 5)):
        rows = table([number % 3 for number in range(count)], classes, column="img")
        rows.to_parquet(cache / "plain_text" / f"{split}-00000-of-00001.parquet")
    splits = read(cache, held_out=0.2, classes=3)
    assert splits.info["class_names"] == classes
    assert splits.info["sizes"]["test"] == 5
    assert sum(splits.info["sizes"].values()) == 35
    check_numbers(splits.test, list(range(5)))
    held = [int(name.removeprefix("train/")) for name in names(splits.validation)]
    check_numbers(splits.validation, held)
    assert [int(row["labels"]) for row in splits.test] == [0, 1, 2, 0, 1]


def test_parquet_as_imagenet_on_the_hub_has_it(cache: Path) -> None:
    """Several shards, and a test split without labels, which cannot be scored."""
    (cache / "data").mkdir(parents=True)
    for shard in range(2):
        rows = table([number % 2 for number in range(6)])
        rows.to_parquet(cache / "data" / f"train-{shard:05}-of-00002.parquet")
    table([0, 1, 0]).to_parquet(cache / "data" / "validation-00000-of-00001.parquet")
    table([-1, -1]).to_parquet(cache / "data" / "test-00000-of-00001.parquet")
    splits = read(cache)
    assert splits.info["sizes"] == {"train": 11, "validation": 1, "test": 3}
    assert splits.info["classes"] == 2
    assert names(splits.test) == ["validation/0", "validation/1", "validation/2"]
    (cache / "data" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"train lacks shards \[0\] of 00002"):
        read(cache)


def test_a_dataset_saved_to_disk(cache: Path) -> None:
    import datasets

    saved = datasets.DatasetDict(
        {"test": table([1]), "train": table([0, 1, 0], ["a", "b"]), "val": table([1, 0])}
    )
    saved.save_to_disk(cache)
    splits = read(cache)
    assert splits.info["sizes"] == {"train": 3, "validation": 2, "test": 1}
    check_numbers(splits.train.rows, [0, 1, 2])
    (batch,) = DataLoader(splits.validation, batch_size=2, num_workers=1)
    assert batch["labels"].tolist() == [1, 0]
    next((cache / "val").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match="tables: a table is damaged or missing"):
        read(cache)


@pytest.mark.parametrize(
    ("labels", "column", "complaint"),
    [
        ({"train": [0, 1], "test": [2, 1]}, "image", r"test has labels \[2\] that train has not"),
        ({"train": [0, -1], "test": [0, 0]}, "image", r"train has labels \[-1\]"),
        ({"train": [0, 1], "test": [-1, -1]}, "image", "expected train and validation"),
        ({"train": [0, 1]}, "image", r"holds \['train'\]"),
        ({"train": [0, 1], "test": [0]}, "photo", "not image"),
    ],
    ids=["unknown", "negative", "unlabelled", "one", "column"],
)
def test_tables_that_cannot_serve_are_refused(
    cache: Path, labels: dict[str, list[int]], column: str, complaint: str
) -> None:
    cache.mkdir()
    for split, some in labels.items():
        table(some, column=column).to_parquet(cache / f"{split}.parquet")
    with pytest.raises(ValueError, match=complaint):
        read(cache)


def test_a_damaged_parquet_file_is_refused(cache: Path) -> None:
    cache.mkdir()
    for split in ("train", "test"):
        table([0, 1]).to_parquet(cache / f"{split}.parquet")
    (cache / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="tables: a table is damaged or missing"):
        read(cache)


def remove(path: str) -> Callable[[Path], object]:
    return lambda root: shutil.rmtree(root / path)


def make(path: str) -> Callable[[Path], object]:
    return lambda root: (root / path).mkdir(parents=True)


def flatten(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    picture(0).save(root / "val" / "0.png")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda root: shutil.rmtree(root), "pets is no folder"),
        (remove("train"), r"pets holds \['val'\]: expected train"),
        (remove("val"), r"pets holds \['train'\]"),
        (make("valid/cat"), "pets has valid and val: which one is validation"),
        (make("val/fox"), r"val/ has classes that train/ has not: \['fox'\]"),
        (make("train/fox"), "train/fox/ has no images"),
        (flatten, "val/ has no class folders"),
    ],
    ids=["path", "train", "val", "twice", "class", "empty", "flat"],
)
def test_folders_that_cannot_serve_are_refused(
    tmp_path: Path, change: Callable[[Path], object], complaint: str
) -> None:
    change(plant(tmp_path / "pets", PLAIN))
    with pytest.raises(ValueError, match=complaint):
        read(tmp_path / "pets")


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"classes": 10}, "classes=10, but pets has 2"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"damaged": "ignore"}, "damaged='ignore'"),
        ({"steps": 0}, "length=0"),
    ],
    ids=["classes", "held_out", "damaged", "steps"],
)
def test_settings_that_cannot_serve_are_refused(
    tmp_path: Path, setting: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        read(plant(tmp_path / "pets", PLAIN), **setting)


def broken(tmp_path: Path) -> tuple[Path, list[str]]:
    """Four damaged training images, one in test, among whole ones."""
    root = plant(tmp_path / "pets", {"train/cat": 9, "val/cat": 3, "test/cat": 3})
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(root / "train/cat/cut.jpg")
    whole = (root / "train/cat/cut.jpg").read_bytes()
    (root / "train/cat/cut.jpg").write_bytes(whole[:-20])
    whole = (root / "train/cat/000.png").read_bytes()
    (root / "train/cat/000.png").write_bytes(whole[: len(whole) // 2])
    (root / "train/cat/empty.jpg").touch()
    (root / "train/cat/text.png").write_text("no image")
    (root / "test/cat/link.png").symlink_to("nowhere.png")
    bad = ["train/cat/000.png", "train/cat/cut.jpg", "train/cat/empty.jpg", "train/cat/text.png"]
    return root, [*bad, "test/cat/link.png"]


def test_damaged_images_are_found_named_and_left_out(tmp_path: Path) -> None:
    root, bad = broken(tmp_path)
    rows = read(root).train.rows
    calls: list[tuple[int, int]] = []
    found = rows.damaged(lambda done, of: calls.append((done, of)))
    assert [rows.name(index) for index in found] == bad[:4]
    assert calls == [(len(rows), len(rows))]
    splits = read(root, damaged="skip")
    assert splits.info["damaged"] == {"policy": "skip", "left_out": 5, "names": bad}
    assert splits.info["sizes"] == {"train": 8, "validation": 3, "test": 3}
    assert set(names(splits.train.rows)).isdisjoint(bad)
    assert len(list(splits.train)) == 16  # every one of them can be read
    assert len(list(splits.test)) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_ends_the_run_by_its_name(tmp_path: Path, workers: int) -> None:
    root, bad = broken(tmp_path)
    splits = read(root)
    for rows in (splits.train.rows, splits.test):
        for index, name in enumerate(names(rows)):
            if name in bad:
                with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
                    rows[index]
            else:
                rows[index]
    said = ""
    try:
        list(DataLoader(splits.train, batch_size=4, num_workers=workers))
    except ValueError as error:
        # without its frames, or the worker waits 5 s for the garbage collector
        said = str(error.with_traceback(None))
    assert any(f"{name} cannot be read as an image" in said for name in bad[:4])


def test_a_split_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    root = plant(tmp_path / "pets", {"train/cat": 3, "val/cat": 1, "test/cat": 1})
    next((root / "val/cat").iterdir()).write_bytes(b"")
    with pytest.raises(ValueError, match="pets: no image is left for validation"):
        read(root, damaged="skip")


def one(image: Image.Image, tmp_path: Path, name: str, **view: Any) -> torch.Tensor:
    """Pixels [3, size, size] in levels of 0 to 255, from a file."""
    (tmp_path / name).unlink(missing_ok=True)
    image.save(tmp_path / name)
    scale = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}
    rows = ImageRows(FolderPictures(tmp_path, [name], [0]), np.array([0]), View(**scale, **view))
    return rows[0]["pixel_values"]


@pytest.mark.parametrize(
    ("mode", "name", "colour", "expected"),
    [
        ("L", "a.jpg", 100, (100, 100, 100)),
        ("CMYK", "a.jpg", (255, 0, 0, 0), (0, 255, 255)),
        ("RGBA", "a.png", (10, 20, 30, 0), (10, 20, 30)),
        ("LA", "a.png", (50, 0), (50, 50, 50)),
        ("1", "a.png", 1, (255, 255, 255)),
    ],
    ids=["grey", "cmyk", "rgba", "grey-alpha", "bits"],
)
def test_every_mode_becomes_rgb(
    tmp_path: Path, mode: str, name: str, colour: Any, expected: tuple[int, ...]
) -> None:
    shown = one(Image.new(mode, (9, 9), colour), tmp_path, name, size=4)
    # JPEG's flat colours are off by a level or two of its colour conversion
    assert (shown - torch.tensor(expected)[:, None, None]).abs().max() <= 2


def test_a_palette_with_transparency_becomes_rgb_without_a_warning(tmp_path: Path) -> None:
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.info["transparency"] = b"\x00\x80"
    shown = one(image, tmp_path, "a.png", size=4)
    assert torch.equal(shown.round(), torch.tensor([10.0, 200, 30])[:, None, None].expand(3, 4, 4))


def test_more_than_eight_bits_are_refused_rather_than_whitened(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((9, 9), 300, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"a.png cannot be read as an image \(TypeError\)"):
        one(deep, tmp_path, "a.png", size=4)


def test_a_large_jpeg_decoded_smaller_shows_the_same_place(tmp_path: Path) -> None:
    """A linear ramp in both directions, so that a box off by one pixel shows."""
    y, x = np.mgrid[:1203, :1604]
    ramp = np.stack([x * 255 / 1604, y * 255 / 1203, x * 0 + 128], axis=-1).astype(np.uint8)
    shown = one(Image.fromarray(ramp), tmp_path, "a.jpg", size=16)
    side = 1203 * 224 / 256
    place = (np.arange(16) + 0.5) * side / 16
    across = ((1604 - side) / 2 + place) * 255 / 1604
    down = ((1203 - side) / 2 + place) * 255 / 1203
    # truncated to levels (−0.5 on average, ±0.5), JPEG's quantisation and the chroma at half the
    # resolution: 3 levels; an output pixel is 10 of them, a box in unscaled pixels off by 100
    assert np.abs(shown[0].numpy() - across).max() < 3
    assert np.abs(shown[1].numpy() - down[:, None]).max() < 3


def test_training_items_follow_from_seed_and_position_alone(tmp_path: Path) -> None:
    root = plant(tmp_path, PLAIN)
    first = read(root, batch=8, repeats=2)
    alone = [item["pixel_values"] for item in first.train]
    torch.manual_seed(123)
    np.random.seed(123)
    collate = Mixed(classes=2, mixup=0.2, cutmix=1.0, seed=0)
    batches = [
        list(DataLoader(again.train, batch_size=4, num_workers=workers, collate_fn=collate))
        for again, workers in ((read(root, batch=8, repeats=2), 0), (first, 2))
    ]
    for here, there in zip(*batches, strict=True):
        assert here.keys() == {"pixel_values", "labels"}
        assert all(torch.equal(here[key], there[key]) for key in here)
    later = read(root, batch=8, repeats=2).train
    for position in (31, 17, 3):
        assert torch.equal(later[position]["pixel_values"], alone[position])
    row = later.index(3)
    shown = [later.rows.augmented(row, draw)["pixel_values"] for draw in ((0, 3), (0, 7), (1, 3))]
    assert torch.equal(shown[0], alone[3])
    assert later.index(7) == row
    assert torch.equal(shown[1], alone[7])
    assert not torch.equal(shown[1], shown[0])
    assert not torch.equal(shown[2], shown[0])
