"""Images decoded once, for sets that fit in memory and runs that are many and short."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from actsparse_lab.data.images import ImageRows, image_splits
from actsparse_lab.data.splits import Splits, TensorRows

PLAIN: dict[str, Any] = {"crop": 0, "flip": False, "randaugment": None}
ORDER: dict[str, Any] = {"steps": 1, "batch": 1, "seed": 0, "repeats": 1}


def decoded_image_splits(path: str | Path, **settings: Any) -> Splits[TensorRows]:
    """`image_splits` without augmentation, every image decoded now and held as float32.

    ``settings``: ``size``, ``held_out``, ``mean`` and the others of `image_splits` that say what an
    image is. A second call in the same process takes the images of the first.

    Raises `ValueError` as `image_splits` does, and for a setting of augmentation or order.
    """
    if drawn := sorted(settings.keys() & {*PLAIN, *ORDER}):
        raise ValueError(
            f"{drawn[0]}={settings[drawn[0]]!r}: decoded images are not augmented, and hold no "
            f"order; leave out {', '.join(drawn)}"
        )
    plain = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}  # JSON
    return _decoded(Path(path), tuple(sorted((plain | PLAIN).items())))


@lru_cache(maxsize=1)
def _decoded(path: Path, settings: tuple[tuple[str, Any], ...]) -> Splits[TensorRows]:
    found = image_splits(path, **ORDER, **dict(settings))
    train = found.train.rows  # type: ignore[union-attr]
    assert isinstance(train, ImageRows)
    info = {k: v for k, v in found.info.items() if k not in ("positions", "repeats", "order_seed")}
    return Splits(_tensors(train), _tensors(found.validation), _tensors(found.test), info)  # type: ignore[arg-type]


def _tensors(rows: ImageRows) -> TensorRows:
    items = [rows[index] for index in range(len(rows))]
    return TensorRows(**{name: torch.stack([item[name] for item in items]) for name in items[0]})
