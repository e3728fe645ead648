"""What training does to images: crop, flip, RandAugment; to batches: mixup, cutmix; their order.

Every draw comes from a numpy generator that the caller seeds from the position in training, and
from nothing else: workers, processes and resumed runs see the same pixels.

RandAugment is written here, from Pillow's operations, and not taken from kornia: the recipe is
torchvision's, at magnitude 9 of 30, and kornia 0.9 means something else by that. Its brightness is
added rather than multiplied, its contrast is Pillow's brightness, both only ever darken, its shear
is three times steeper, its solarisation inverts from 0.3 up rather than from 0.7 up. Mixup and
cutmix are written as their formulas too: kornia's mixup draws λ evenly, its cutmix draws a box for
each image, always whole inside it; both pair at random, also an image with itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Streams of draws that must not repeat each other, as the first word of a generator's seed.
ORDER, ITEM, MIX = 0, 1, 2

OPERATIONS = (
    "identity auto_contrast equalize posterize solarize rotate shear_x shear_y translate_x "
    "translate_y brightness color contrast sharpness"
).split()


def rand_augment(
    image: Picture, operations: int, magnitude: float, rng: np.random.Generator
) -> Picture:
    """`operations` of RandAugment's fourteen, drawn evenly with replacement (arXiv 1909.13719).

    All at `magnitude` of 30, with a random sign where there are two directions. Ranges are
    torchvision's (the recipe's): at 30 a shear of 0.3, a shift of 150/331 of the side, a turn of
    30°, factors 1 ± 0.9, 4 bits, solarisation of everything. What moves in from outside is black.

    >>> from PIL import Image
    >>> image = Image.new("RGB", (8, 8), "white")
    >>> rand_augment(image, 2, 9, np.random.default_rng(0)).size
    (8, 8)
    """
    for _ in range(operations):
        name = OPERATIONS[rng.integers(len(OPERATIONS))]
        image = apply_operation(image, name, magnitude / 30, 1 if rng.random() < 0.5 else -1)
    return image


def apply_operation(image: Picture, name: str, strength: float, sign: int = 1) -> Picture:
    """One of `OPERATIONS`, `strength` from 0 to 1, on an RGB image."""
    from PIL import Image, ImageEnhance, ImageOps

    width, height = image.size
    signed = sign * strength
    match name:
        case "identity":
            return image
        case "auto_contrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "posterize":
            return ImageOps.posterize(image, 8 - round(4 * strength))
        case "solarize":
            return ImageOps.solarize(image, round(255 * (1 - strength)))
        case "rotate":
            return image.rotate(30 * signed, Image.Resampling.BILINEAR)
        case "brightness" | "color" | "contrast" | "sharpness":
            return getattr(ImageEnhance, name.capitalize())(image).enhance(1 + 0.9 * signed)
    matrix = {
        "shear_x": (1, 0.3 * signed, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * signed, 1, 0),
        "translate_x": (1, 0, int(150 / 331 * width * signed), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, int(150 / 331 * height * signed)),
    }[name]
    method, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return image.transform(image.size, method, matrix, bilinear)


def random_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Where to crop: `scale` of the area, an aspect ratio from 3/4 to 4/3 (Szegedy et al. 2015).

    The share is drawn evenly, the ratio evenly in its logarithm, whole pixels. What does not fit
    is drawn again; after ten times it is the largest centred box with such a ratio.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return (x, y, x + w, y + h)
    return centred_box(width, height, min(width, height * 4 / 3), min(height, width * 4 / 3))


def centred_box(width: int, height: int, w: float, h: float) -> Box:
    """The box of w × h pixels in the middle.

    >>> centred_box(10, 6, 4, 4)
    (3.0, 1.0, 7.0, 5.0)
    """
    x, y = (width - w) / 2, (height - h) / 2
    return (x, y, x + w, y + h)


@dataclass(frozen=True)
class View:
    """How an image becomes `pixel_values` [3, size, size] float32.

    Each view is one box of the image, resized bilinearly with antialiasing, once. In evaluation
    it is the centred square of 224/256 of the shorter side: what resizing that side to
    size·256/224 and cropping the centre shows, without their two roundings to whole pixels.

    `crop` is the range of areas of the training crop (`random_box`), or the pixels of black
    padding around images that are small already (then evaluation shows the whole shorter side), or
    None for the same box as in evaluation. `flip` mirrors every other image, at random.
    `randaugment` is (operations, magnitude of 30) or None. `mean` and `std` are of pixels in
    [0, 1], by channel.

    Raises `ValueError` for a size below 1 and for ranges that make no crop or operation.
    """

    size: int = 224
    crop: tuple[float, float] | int | None = (0.08, 1.0)
    flip: bool = True
    randaugment: tuple[int, float] | None = (2, 9)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1 pixel")
        match self.crop:
            case None:
                pass
            case int(padding) if padding >= 0:
                pass
            case (low, high) if 0 < low <= high <= 1:
                pass
            case _:
                raise ValueError(
                    f"crop={self.crop!r} must be shares of the area, 0 < low ≤ high ≤ 1, pixels of "
                    "padding, or None"
                )
        match self.randaugment:
            case None:
                pass
            case (int(operations), magnitude) if operations >= 1 and 0 <= magnitude <= 30:
                pass
            case _:
                raise ValueError(
                    f"randaugment={self.randaugment!r} must be (operations from 1, magnitude 0 to "
                    "30), or None"
                )

    def box(self, width: int, height: int, rng: np.random.Generator | None = None) -> Box:
        """Which part of a width × height image to show; with `rng` as in training."""
        if isinstance(self.crop, int):
            side = float(min(width, height))
        elif self.crop is None or rng is None:
            side = min(width, height) * 224 / 256
        else:
            return random_box(width, height, self.crop, rng)
        return centred_box(width, height, side, side)

    def pixels(self, image: Picture, box: Box, rng: np.random.Generator | None = None) -> Tensor:
        """`box` of an RGB image as `pixel_values`; with `rng` as in training."""
        from PIL import Image

        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        if rng is not None:
            if isinstance(self.crop, int):
                x, y = (int(start) - self.crop for start in rng.integers(2 * self.crop + 1, size=2))
                image = image.crop((x, y, x + self.size, y + self.size))
            if self.flip and rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if self.randaugment is not None:
                image = rand_augment(image, *self.randaugment, rng)
        channels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        values = channels.to(torch.float32, memory_format=torch.contiguous_format)
        mean, std = (torch.tensor(three)[:, None, None] for three in (self.mean, self.std))
        return values.div_(255).sub_(mean).div_(std)


@dataclass(frozen=True)
class Mixed:
    """A collator: stacks a batch and mixes each image with the one before it.

    Mixup (Zhang et al. 2018, arXiv 1710.09412): ``λ·x + (1−λ)·x'``, λ from Beta(α, α), α =
    `mixup`. Cutmix (Yun et al. 2019, arXiv 1905.04899): a box of ``√(1−λ)`` of each side, its
    centre anywhere, shows x'; λ from Beta(α, α), α = `cutmix`, then set to the share of x that
    is left. x' is x rolled by one along the batch: alone, an image meets itself. One λ and one box
    a batch, and one of the two ways, drawn evenly; an α of 0 turns a way off.

    Labels become probabilities [B, classes] float32, ``λ·y + (1−λ)·y'``; with both ways off they
    stay int64 [B]. The draw is a function of `seed` and of `draw`, the position that `Stream`
    gives its items; it is dropped from the batch. Items without it are evaluation's and are
    only stacked: a trainer that drops columns by name (`remove_unused_columns`) must not drop it.

    Raises `ValueError` for a negative α, and for a label that is none of the `classes`.

    >>> items = [{"pixel_values": torch.ones(1, 2, 2) * n, "labels": n, "draw": n} for n in (0, 1)]
    >>> batch = Mixed(classes=2, mixup=0.2, cutmix=0.0, seed=0)(items)
    >>> share = batch["labels"][1, 1]  # λ
    >>> torch.equal(batch["pixel_values"][1], torch.ones(1, 2, 2) * share)
    True
    """

    classes: int
    mixup: float
    cutmix: float
    seed: int

    def __post_init__(self) -> None:
        for name, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            if not alpha >= 0:
                raise ValueError(f"{name}={alpha} is the α of Beta(α, α): above 0, or 0 for none")

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`pixel_values` [B, C, height, width] and `labels` of B items."""
        images = torch.stack([item["pixel_values"] for item in items])
        labels = torch.tensor([int(item["labels"]) for item in items])
        if "draw" not in items[0] or not (self.mixup or self.cutmix):
            return {"pixel_values": images, "labels": labels}
        if not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ValueError(f"labels {labels.tolist()} must lie in 0 to {self.classes - 1}")
        shares = F.one_hot(labels, self.classes).float()
        rng = np.random.default_rng([MIX, self.seed, int(items[0]["draw"])])
        cut = rng.random() < 0.5 if self.mixup and self.cutmix else self.cutmix > 0
        images, kept = (self._cut if cut else self._mix)(images, rng)
        return {"pixel_values": images, "labels": shares.roll(1, 0).lerp_(shares, kept)}

    def _mix(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, float]:
        kept = float(rng.beta(self.mixup, self.mixup))
        return images.roll(1, 0).lerp_(images, kept), kept

    def _cut(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, float]:
        side = math.sqrt(1 - rng.beta(self.cutmix, self.cutmix))
        spans = []
        for pixels in images.shape[-2:]:
            length = round(side * pixels)
            start = int(rng.integers(pixels)) - length // 2
            spans.append(slice(max(start, 0), min(start + length, pixels)))
        rows, columns = spans
        images[..., rows, columns] = images[..., rows, columns].roll(1, 0)
        return images, 1 - images[0, 0, rows, columns].numel() / images[0, 0].numel()


class Augmentable(Protocol):
    """What `Stream` reads: rows that can be shown in another way for every draw."""

    def __len__(self) -> int: ...

    def augmented(self, index: int, draw: tuple[int, int]) -> dict[str, Any]:
        """Row `index` as the draw (seed, position) shows it."""
        ...


class Stream(Dataset[dict[str, Any]]):
    """The whole training as a sequence: item p is what stands at position p, to be read in order.

    An epoch has as many items as there are N rows. It shows ⌈N/repeats⌉ of them, `repeats` times
    each with other draws, and the next epoch draws a new order (repeated augmentation: Hoffer et
    al. 2020, arXiv 1901.09335, as DeiT's sampler does it). So with three repeats an epoch leaves
    two rows in three out. Within a step the copies of a row lie about ``batch/repeats`` positions
    apart: they meet in different micro-batches and processes, and are not mixed with each other.

    An item is ``rows.augmented(index, draw=(seed, p))`` and ``"draw": p``, for `Mixed`.

    Raises `ValueError` without rows, and for `length`, `batch` or `repeats` below 1.

    >>> class Names:
    ...     def __len__(self):
    ...         return 4
    ...
    ...     def augmented(self, index, draw):
    ...         return {"name": "abcd"[index]}
    >>> stream = Stream(Names(), 8, batch=4, seed=0, repeats=2)
    >>> "".join(item["name"] for item in stream)
    'cacadbdb'
    """

    def __init__(
        self, rows: Augmentable, length: int, *, batch: int, seed: int, repeats: int = 1
    ) -> None:
        for name, value in (("length", length), ("batch", batch), ("repeats", repeats)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not len(rows):
            raise ValueError("there are no images to train on")
        self.rows, self.length = rows, length
        self.batch, self.seed, self.repeats = batch, seed, repeats

    def index(self, position: int) -> int:
        """The row that stands at `position`."""
        step, number = divmod(position, self.batch)
        place = step * self.batch + int(_apart(self.batch, self.repeats)[number])
        epoch, place = divmod(place, len(self.rows))
        return int(_permutation(self.seed, epoch, len(self.rows))[place // self.repeats])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, Any]:
        position = range(self.length)[position]  # IndexError past the end, and −1 is the last
        item = self.rows.augmented(self.index(position), draw=(self.seed, position))
        return {**item, "draw": position}


@lru_cache(maxsize=2)
def _apart(batch: int, repeats: int) -> NDArray[np.int64]:
    """The places of a step, each ``repeats``-th first, then those after them."""
    return np.argsort(np.arange(batch) % repeats, kind="stable")


@lru_cache(maxsize=2)  # a step may reach from one permutation into the next
def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([ORDER, seed, epoch]).permutation(count)
