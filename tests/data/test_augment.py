from __future__ import annotations

import math
from collections import Counter
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from actsparse_lab.data import augment
from actsparse_lab.data.augment import (
    OPERATIONS,
    Mixed,
    Stream,
    View,
    apply_operation,
    rand_augment,
    random_box,
)


class Noise:
    """Rows whose `augmented` shows which row and which draw it was asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def augmented(self, index: int, draw: tuple[int, int]) -> dict[str, Any]:
        rng = np.random.default_rng(draw)
        return {"pixel_values": torch.from_numpy(rng.random((3, 2, 2))), "labels": index}


rows = st.integers(1, 12)
batches = st.integers(1, 10)
repeats = st.integers(1, 5)


@given(rows, batches, repeats, st.integers(0, 3))
def test_items_come_as_one_order_of_the_images_after_the_other_each_image_repeated(
    count: int, batch: int, repeats: int, seed: int
) -> None:
    """Whatever the batch, which only says how copies are laid apart within a step."""
    stream = Stream(Noise(count), 3 * count * batch, batch=batch, seed=seed, repeats=repeats)
    shown = [stream.index(position) for position in range(3 * count * batch)]
    plain = Stream(Noise(count), 3 * count * batch, batch=1, seed=seed, repeats=repeats)
    order = [plain.index(position) for position in range(3 * count * batch)]
    for start in range(0, 3 * count * batch, batch):
        assert sorted(shown[start : start + batch]) == sorted(order[start : start + batch])
    sizes = [repeats] * (count // repeats) + [count % repeats] * (count % repeats > 0)
    for start in range(0, 3 * count, count):
        runs = [len(list(each)) for _, each in groupby(order[start : start + count])]
        assert runs == sizes
        assert len(set(order[start : start + count])) == len(sizes)


@given(st.integers(1, 4), repeats, st.integers(0, 3))
def test_copies_of_an_image_lie_as_far_apart_as_a_step_has_images(
    images: int, repeats: int, seed: int
) -> None:
    batch = images * repeats  # an epoch of two such steps
    stream = Stream(Noise(2 * batch), 4 * batch, batch=batch, seed=seed, repeats=repeats)
    for step in range(4):
        shown = [stream.index(step * batch + k) for k in range(batch)]
        assert shown == shown[:images] * repeats
        assert len(set(shown)) == images


def test_an_epoch_has_another_order_than_the_last_and_a_seed_than_another() -> None:
    stream = Stream(Noise(50), 100, batch=10, seed=0)
    order = [stream.index(position) for position in range(100)]
    assert order[:50] != order[50:]
    other = Stream(Noise(50), 100, batch=10, seed=1)
    assert order != [other.index(position) for position in range(100)]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_workers_and_a_resumed_run_see_the_same_items(processes: int) -> None:
    """Batches of 2 are dealt to the processes in turn; the second half is read by a new run."""

    def make() -> Stream:
        return Stream(Noise(7), 32, batch=8, seed=5, repeats=3)

    alone = {position: make()[position] for position in reversed(range(32))}
    seen: dict[int, Tensor] = {}
    for start, workers in ((0, 0), (16, 2)):
        torch.manual_seed(start)  # the program's own generators take no part
        for process in range(processes):
            dealt = [
                position
                for position in range(start, start + 16)
                if position // 2 % processes == process
            ]
            loader = DataLoader(make(), batch_size=2, sampler=dealt, num_workers=workers)
            for batch in loader:
                for position, pixels, label in zip(
                    batch["draw"].tolist(), batch["pixel_values"], batch["labels"], strict=True
                ):
                    assert position not in seen
                    assert label == alone[position]["labels"]
                    seen[position] = pixels
    assert sorted(seen) == list(range(32))
    assert all(torch.equal(seen[position], alone[position]["pixel_values"]) for position in seen)


def test_a_stream_is_a_sequence_and_refuses_what_gives_none() -> None:
    stream = Stream(Noise(3), 6, batch=2, seed=0)
    assert stream[-1]["draw"] == 5
    with pytest.raises(IndexError):
        stream[6]
    for bad in ({"length": 0}, {"batch": 0}, {"repeats": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}=0"):
            Stream(**{"rows": Noise(3), "length": 6, "batch": 2, "seed": 0, **bad})
    with pytest.raises(ValueError, match="no images"):
        Stream(Noise(0), 6, batch=2, seed=0)


def ramp() -> np.ndarray:
    """[16, 20, 3] uint8: red counts columns, green rows, blue is both."""
    y, x = np.mgrid[:16, :20]
    return np.stack([x * 12, y * 15, (x + y) * 7], axis=-1).astype(np.uint8)


def operate(name: str, strength: float, sign: int = 1) -> np.ndarray:
    return np.array(apply_operation(Image.fromarray(ramp()), name, strength, sign))


def test_point_operations_are_their_formulas_at_the_recipes_magnitude() -> None:
    pixels = ramp().astype(np.float64)
    m = 9 / 30
    assert (operate("identity", m) == ramp()).all()
    assert (operate("posterize", m) == ramp() & 0b11111110).all()  # 7 bits
    assert (operate("solarize", m) == np.where(pixels < 178, pixels, 255 - pixels)).all()
    for sign in (1, -1):
        factor = 1 + sign * 0.27
        brighter = np.clip(pixels * factor, 0, 255)
        # Pillow truncates or rounds to whole levels, so within one of the formula
        assert np.abs(operate("brightness", m, sign) - brighter).max() <= 1
        # ITU-R 601 luma, rounded; the mean over all pixels, rounded
        luma = pixels @ [0.299, 0.587, 0.114]
        contrast = np.clip(luma.mean() + factor * (pixels - luma.mean()), 0, 255)
        # the two roundings move the mean by up to one level, times |1 − factor| < 1, plus one
        assert np.abs(operate("contrast", m, sign) - contrast).max() <= 2
        color = np.clip(luma[..., None] + factor * (pixels - luma[..., None]), 0, 255)
        assert np.abs(operate("color", m, sign) - color).max() <= 2
    stretched = operate("auto_contrast", m)
    assert (stretched.min((0, 1)) == 0).all()
    assert (stretched.max((0, 1)) == 255).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_sharpness_moves_away_from_the_smoothed_image(sign: int) -> None:
    pixels = np.random.default_rng(0).integers(60, 200, (9, 9)).astype(np.uint8)
    image = Image.fromarray(np.repeat(pixels[..., None], 3, axis=-1))
    inner = np.lib.stride_tricks.sliding_window_view(pixels.astype(np.float64), (3, 3))
    smooth = (inner.sum((2, 3)) + 4 * inner[..., 1, 1]) / 13  # Pillow's SMOOTH
    expected = smooth + (1 + sign * 0.27) * (inner[..., 1, 1] - smooth)
    shown = np.array(apply_operation(image, "sharpness", 0.3, sign))[1:-1, 1:-1, 0]
    assert np.abs(shown - expected).max() <= 1 + 0.27 / 2  # cut off; smooth is rounded
    assert np.abs(expected - inner[..., 1, 1]).max() > 10


@pytest.mark.parametrize("sign", [1, -1])
def test_shifts_are_whole_pixels_with_black_behind(sign: int) -> None:
    x = int(150 / 331 * 20 * 0.3) * sign
    y = int(150 / 331 * 16 * 0.3) * sign
    assert (abs(x), abs(y)) == (2, 2)
    empty = np.zeros_like(ramp())
    across, down = empty.copy(), empty.copy()
    across[:, max(-x, 0) : 20 - max(x, 0)] = ramp()[:, max(x, 0) : 20 + min(x, 0)]
    down[max(-y, 0) : 16 - max(y, 0)] = ramp()[max(y, 0) : 16 + min(y, 0)]
    assert (operate("translate_x", 0.3, sign) == across).all()
    assert (operate("translate_y", 0.3, sign) == down).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_shear_and_rotation_show_the_place_their_geometry_says(sign: int) -> None:
    """The ramp is linear, so bilinear values are those of the place; levels are rounded."""
    slope = sign * 0.3 * 0.3
    y, x = np.mgrid[:16, :20] + 0.5
    angle = math.radians(sign * 9)
    across, down = x - 10, y - 8
    turned_x = 10 + math.cos(angle) * across - math.sin(angle) * down
    turned_y = 8 + math.sin(angle) * across + math.cos(angle) * down
    for name, place_x, place_y in (
        ("shear_x", x + slope * y, y),
        ("shear_y", x, y + slope * x),
        ("rotate", turned_x, turned_y),
    ):
        inside = (place_x > 1) & (place_x < 19) & (place_y > 1) & (place_y < 15)
        assert inside.mean() > 0.6
        shown = operate(name, 0.3, sign).astype(np.float64)
        assert np.abs(shown[..., 0] - (place_x - 0.5) * 12)[inside].max() <= 1
        assert np.abs(shown[..., 1] - (place_y - 0.5) * 15)[inside].max() <= 1


def test_operations_are_drawn_evenly_with_both_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, float, int]] = []

    def record(image: Any, name: str, strength: float, sign: int) -> Any:
        drawn.append((name, strength, sign))
        return image

    monkeypatch.setattr(augment, "apply_operation", record)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        rand_augment(Image.new("RGB", (1, 1)), 2, 9, rng)
    assert len(drawn) == 4000
    assert {strength for _, strength, _ in drawn} == {0.3}
    counts = Counter((name, sign) for name, _, sign in drawn)
    assert len(counts) == 2 * len(OPERATIONS) == 28
    # Bernstein: n = 4000, p = 1/28, failure 1e-6 over 28 cells: |count/n − p| < 0.0185
    log = math.log(2 * 28 / 1e-6)
    bound = math.sqrt(2 * (1 / 28) * log / 4000) + 2 * log / (3 * 4000)
    assert all(abs(count / 4000 - 1 / 28) < bound for count in counts.values())


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32))
def test_a_random_box_lies_inside_with_the_area_and_ratio_asked_for(
    width: int, height: int, seed: int
) -> None:
    x0, y0, x1, y1 = random_box(width, height, (0.3, 0.3), np.random.default_rng(seed))
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height
    w, h = x1 - x0, y1 - y0
    # each side is rounded by at most half a pixel
    assert (w - 0.5) / (h + 0.5) <= 4 / 3 + 1e-9
    assert (w + 0.5) / (h - 0.5) >= 3 / 4 - 1e-9 if h > 0.5 else True
    if min(width, height) >= 0.7 * max(width, height):  # 0.3 of it always fits
        assert (w - 0.5) * (h - 0.5) <= 0.3 * width * height <= (w + 0.5) * (h + 0.5)


def test_a_strip_is_cropped_in_its_middle() -> None:
    box = random_box(1000, 9, (0.5, 1.0), np.random.default_rng(0))
    assert box == (494, 0, 506, 9)  # 9 · 4/3 = 12 wide


def plain(size: int, **other: Any) -> View:
    """A view in levels of 0 to 255, without random steps but those asked for."""
    third = (1 / 255,) * 3
    off: dict[str, Any] = {"crop": None, "flip": False, "randaugment": None}
    return View(size=size, mean=(0.0, 0.0, 0.0), std=third, **{**off, **other})


def levels(view: View, image: Image.Image, rng: np.random.Generator | None = None) -> np.ndarray:
    pixels = view.pixels(image, view.box(*image.size, rng), rng)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    return pixels.permute(1, 2, 0).numpy()


def test_evaluation_is_the_centre_at_256_to_224() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 512, 3)).astype(np.uint8)
    shown = levels(plain(224), Image.fromarray(noise))  # shorter side 256: nothing is resized
    # v/255 and its division by the float32 of 1/255 round three times by 2^-24 each
    np.testing.assert_allclose(shown, noise[16:240, 144:368], rtol=2**-22)


def test_evaluation_halves_a_ramp_to_its_means() -> None:
    y, x = np.mgrid[:64, :64]
    image = Image.fromarray(np.stack([x * 3, y * 3, x + y], axis=-1).astype(np.uint8))
    shown = levels(plain(28), image)  # box 4 to 60, so output i is the middle of 2i + 4, 2i + 5
    column = 3 * (2 * np.arange(28) + 4.5)
    # Pillow rounds to whole levels after each of its two passes: half a level each
    assert np.abs(shown[..., 0] - column).max() <= 1
    assert np.abs(shown[..., 1] - column[:, None]).max() <= 1


def test_pixels_are_normalised_by_channel() -> None:
    image = Image.new("RGB", (4, 4), (10, 100, 200))
    shown = View(size=2).pixels(image, (0, 0, 4, 4))[:, 0, 0].double()
    expected = (torch.tensor([10, 100, 200]) / 255 - torch.tensor([0.485, 0.456, 0.406])).double()
    expected /= torch.tensor([0.229, 0.224, 0.225]).double()
    # three roundings of numbers below 1, divided by 0.22 at least
    assert (shown - expected).abs().max() < 4 * 2**-24 / 0.22


def test_small_images_are_shown_whole_and_shifted_on_black_in_training() -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (32, 32, 3)).astype(np.uint8)
    view = plain(32, crop=4)
    np.testing.assert_allclose(levels(view, Image.fromarray(pixels)), pixels, rtol=2**-22)
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
    windows = {padded[y : y + 32, x : x + 32].tobytes(): (x, y) for y in range(9) for x in range(9)}
    seen = {
        windows[levels(view, Image.fromarray(pixels), rng).round().astype(np.uint8).tobytes()]
        for rng in map(np.random.default_rng, range(1000))
    }
    assert len(seen) == 81  # misses one with a probability of 81·(80/81)^1000 = 3e-4


def test_half_the_images_are_mirrored() -> None:
    pixels = ramp()[:16, :16]
    view = plain(16, crop=0, flip=True)
    flips = 0
    for rng in map(np.random.default_rng, range(4000)):
        shown = levels(view, Image.fromarray(pixels), rng).round()
        flipped = bool((shown == pixels[:, ::-1]).all())
        assert flipped or (shown == pixels).all()
        flips += flipped
    assert abs(flips / 4000 - 0.5) < math.sqrt(math.log(2 / 1e-6) / 8000)  # Hoeffding, 0.043


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"size": 0}, "size=0"),
        ({"crop": (0.0, 1.0)}, r"crop=\(0.0, 1.0\)"),
        ({"crop": (0.9, 0.1)}, "crop="),
        ({"crop": -1}, "crop=-1"),
        ({"crop": 4.0}, "crop=4.0"),
        ({"randaugment": (0, 9)}, "randaugment="),
        ({"randaugment": (2, 31)}, "randaugment="),
        ({"randaugment": 2}, "randaugment=2"),
    ],
    ids=["size", "area", "order", "padding", "pixels", "operations", "magnitude", "pair"],
)
def test_a_view_refuses_what_shows_nothing(bad: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        View(**bad)


def items(count: int, draw: int, side: int = 1) -> list[dict[str, Any]]:
    """Image n is n everywhere and has label n."""
    return [
        {"pixel_values": torch.full((1, side, side), float(n)), "labels": n, "draw": draw + n}
        for n in range(count)
    ]


@given(st.integers(2, 6), st.integers(0, 10**12), st.integers(0, 5))
def test_mixup_is_its_formula_and_cutmix_counts_its_pixels(b: int, draw: int, seed: int) -> None:
    batch = items(b, draw, side=16)
    before = (torch.arange(b) - 1) % b
    mixed = Mixed(b, mixup=0.5, cutmix=0.0, seed=seed)(batch)
    assert mixed["labels"].shape == (b, b)
    assert mixed["labels"].dtype == torch.float32
    # λ and 1 − λ are rounded to float32 each
    assert (mixed["labels"].sum(1) - 1).abs().max() <= 2**-23
    kept = mixed["labels"][torch.arange(b), torch.arange(b)]
    expected = kept * torch.arange(b) + (1 - kept) * before
    # a product, a difference and a sum, of numbers up to b
    assert (mixed["pixel_values"].amax((1, 2, 3)) - expected).abs().max() <= 4 * b * 2**-24
    assert (mixed["pixel_values"].amin((1, 2, 3)) - expected).abs().max() <= 4 * b * 2**-24

    cut = Mixed(b, mixup=0.0, cutmix=1.0, seed=seed)(batch)
    assert (cut["labels"].sum(1) - 1).abs().max() <= 2**-23
    own = (cut["pixel_values"] == torch.arange(b)[:, None, None, None]).float().mean((1, 2, 3))
    other = (cut["pixel_values"] == before[:, None, None, None]).float().mean((1, 2, 3))
    assert torch.equal(own + other, torch.ones(b))
    assert torch.equal(cut["labels"][torch.arange(b), torch.arange(b)], own)
    assert torch.equal(cut["labels"][torch.arange(b), before], other)
    hidden = (cut["pixel_values"][0, 0] != 0).nonzero()
    if len(hidden):  # what is hidden is one box
        spans = hidden.amax(0) - hidden.amin(0) + 1
        assert len(hidden) == spans.prod()


@pytest.mark.parametrize("alpha", [0.2, 2.0])
def test_mixups_share_follows_its_beta_law(alpha: float) -> None:
    from scipy.stats import beta

    n = 2000
    mixed = Mixed(2, mixup=alpha, cutmix=0.0, seed=0)
    shares = np.sort([float(mixed(items(2, draw))["labels"][0, 0]) for draw in range(n)])
    law = beta(alpha, alpha).cdf(shares)
    steps = np.arange(n + 1) / n
    distance = max(np.abs(law - steps[1:]).max(), np.abs(law - steps[:-1]).max())
    # Dvoretzky, Kiefer, Wolfowitz, Massart: exceeded with probability 1e-6; what lies within
    # half a float32 step of 1 is rounded to it
    bound = math.sqrt(math.log(2 / 1e-6) / (2 * n)) + beta(alpha, alpha).sf(1 - 2**-25)
    assert distance < bound
    even = np.linspace(0, 1, 101)
    assert np.abs(beta(alpha, alpha).cdf(even) - even).max() > bound  # an even λ would show


def test_cutmix_boxes_have_the_mean_area_of_the_paper() -> None:
    """Sides √u, u even in [0, 1], a centre anywhere: E(√u − u/4)² = 1/2 − 1/5 + 1/48."""
    n, side = 2000, 64
    mixed = Mixed(2, mixup=0.0, cutmix=1.0, seed=0)
    shares = [1 - float(mixed(items(2, draw, side))["labels"][0, 0]) for draw in range(n)]
    # Hoeffding at 1e-6, and sides rounded to pixels: half a pixel each
    bound = math.sqrt(math.log(2 / 1e-6) / (2 * n)) + 1 / side
    assert abs(np.mean(shares) - (1 / 2 - 1 / 5 + 1 / 48)) < bound


def test_one_of_both_is_drawn_evenly_and_the_same_each_time() -> None:
    mixed = Mixed(2, mixup=1.0, cutmix=1.0, seed=0)
    cuts = 0
    for draw in range(1000):
        first, again = (mixed(items(2, draw, side=8)) for _ in range(2))
        assert torch.equal(first["pixel_values"], again["pixel_values"])
        cuts += len(first["pixel_values"][0].unique()) == 2 or first["labels"][0, 0] == 1
    # Hoeffding; a box without pixels (λ = 1 to within a pixel) counts as a cut
    assert abs(cuts / 1000 - 0.5) < math.sqrt(math.log(2 / 1e-6) / 2000)
    shares = {float(Mixed(2, 1.0, 0.0, seed)(items(2, 0))["labels"][0, 0]) for seed in range(9)}
    assert len(shares) == 9


def test_nothing_is_mixed_where_nothing_can_be() -> None:
    batch = items(3, 0)
    plain = Mixed(3, mixup=0.0, cutmix=0.0, seed=0)(batch)
    assert plain["labels"].tolist() == [0, 1, 2]
    assert plain["labels"].dtype == torch.int64
    assert plain.keys() == {"pixel_values", "labels"}
    single = Mixed(3, mixup=0.2, cutmix=1.0, seed=0)(batch[2:])
    assert single["labels"].tolist() == [[0, 0, 1]]
    assert torch.equal(single["pixel_values"], batch[2]["pixel_values"][None])
    evaluation = [{key: item[key] for key in ("pixel_values", "labels")} for item in batch]
    assert Mixed(3, mixup=0.2, cutmix=1.0, seed=0)(evaluation)["labels"].tolist() == [0, 1, 2]


def test_the_collator_refuses_strange_numbers() -> None:
    with pytest.raises(ValueError, match="mixup=-1"):
        Mixed(2, mixup=-1, cutmix=0.0, seed=0)
    with pytest.raises(ValueError, match=r"labels \[0, 1, 2\] must lie in 0 to 1"):
        Mixed(2, mixup=0.2, cutmix=0.0, seed=0)(items(3, 0))
