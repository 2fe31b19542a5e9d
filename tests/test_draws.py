"""Draws: reference vectors, purity, both samplers against plain transcriptions and known statistics, colours."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from pipeline import draws, parameters, recipes
from pipeline.correspondence import patch_targets
from pipeline.recipes import Augmentation, Cut, Recipe
from pipeline.windows import to_boxes


def recipe(*cuts: Cut) -> Recipe:
    return Recipe("test", "paper", cuts)


def draw(rec: Recipe, size: tuple[int, int], count: int, *, seed: int = 0, epoch: int = 0):
    return draws.draw(draws.distributions(rec), seed, epoch, np.arange(count), np.full((count, 2), size, np.int32))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_its_published_vectors(counter, key, expected) -> None:
    words = [np.uint64(w) for w in (*counter, *key)]
    assert tuple(int(w) for w in draws.philox(*words)) == expected
    assert tuple(int(w) for w in draws.philox.py_func(*words)) == expected


def test_a_draw_depends_on_seed_epoch_and_sample_and_on_nothing_else() -> None:
    distributions = draws.distributions(recipes.loca("paper"))
    index = np.array([7, 2**40 + 3, 0, 7, 99])
    sizes = np.array([[300, 400], [500, 333], [64, 64], [300, 400], [1, 1]], np.int32)
    windows, params = draws.draw(distributions, 5, 3, index, sizes)
    for b in range(len(index)):  # alone as in company
        alone = draws.draw(distributions, 5, 3, index[b : b + 1], sizes[b : b + 1])
        assert np.array_equal(alone[0][0], windows[b])
        assert np.array_equal(alone[1][0], params[b])
    assert np.array_equal(windows[0], windows[3])
    for other in ({"seed": 6, "epoch": 3}, {"seed": 5, "epoch": 4}, {"seed": 5 + 2**32, "epoch": 3}):
        changed, _ = draws.draw(distributions, other["seed"], other["epoch"], index, sizes)
        assert not np.array_equal(changed[0], windows[0])
    low, _ = draws.draw(distributions, 5, 3, np.array([3]), sizes[1:2])  # the upper half of a sample's number counts
    assert not np.array_equal(low[0], windows[1])
    views = {tuple(w) for w in windows[0]}
    assert len(views) == windows.shape[1]


def test_colours_do_not_move_windows() -> None:
    cut = Cut("image", 3, 32, 2)
    painted = replace(cut, augmentations=(Augmentation(jitter=0.8, gray=0.2, blur=0.5, solarize=0.2),))
    assert np.array_equal(draw(recipe(cut), (50, 70), 100)[0], draw(recipe(painted), (50, 70), 100)[0])


def test_the_python_text_of_the_kernel_draws_the_same() -> None:
    rec = recipes.loca("released", focal_views=2)
    table = draws.distributions(rec)
    index, sizes = np.arange(3), np.array([[37, 50], [4, 200], [1, 1]], np.int32)
    windows, params = draws._draw.py_func(table, np.uint64(9), np.uint64(1), index, sizes, 0)
    again = draws.draw(table, 9, 1, index, sizes)
    assert np.array_equal(windows, again[0])
    assert np.allclose(params, again[1], atol=1e-6)


SAMPLERS = [
    Cut("a", 1, 32, 2, (0.32, 1.0)),
    Cut("a", 1, 32, 2, (0.05, 0.32)),
    Cut("a", 1, 32, 2, (0.32, 1.0), (0.75, 1.33), "tensorflow"),
    Cut("a", 1, 32, 2, (0.05, 0.32), (0.75, 1.33), "tensorflow"),
    Cut("a", 1, 32, 2, (0.875, 0.875), sampler="centre"),
]


@pytest.mark.parametrize("cut", SAMPLERS, ids=lambda c: f"{c.sampler}-{c.scale[0]}")
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (1, 500), (500, 1), (2, 3), (10, 500), (500, 10), (300, 400)])
def test_windows_are_whole_inside_and_never_empty(cut: Cut, size: tuple[int, int]) -> None:
    windows, _ = draw(recipe(cut), size, 500)
    boxes, _ = to_boxes(windows[:, 0])
    y, x, h, w = boxes.T
    assert np.array_equal(boxes, np.rint(boxes))
    assert (h >= 1).all() and (w >= 1).all() and (y >= 0).all() and (x >= 0).all()
    assert (y + h <= size[0]).all() and (x + w <= size[1]).all()


def torchvision_boxes(height: int, width: int, scale, ratio, count: int, rng: random.Random) -> np.ndarray:
    """RandomResizedCrop, transcribed with Python's own random numbers."""

    def one() -> tuple[int, int, int, int]:
        for _ in range(10):
            area = height * width * rng.uniform(*scale)
            aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return rng.randint(0, height - h), rng.randint(0, width - w), h, w
        if width / height < ratio[0]:
            w, h = width, round(width / ratio[0])
        elif width / height > ratio[1]:
            w, h = round(height * ratio[1]), height
        else:
            w, h = width, height
        return (height - h) // 2, (width - w) // 2, h, w

    return np.array([one() for _ in range(count)], float)


def tensorflow_boxes(height: int, width: int, scale, ratio, count: int, rng: random.Random) -> np.ndarray:
    """sample_distorted_bounding_box of the whole image, in the words of its definition."""

    def one() -> tuple[int, int, int, int]:
        least, most = scale[0] * height * width, scale[1] * height * width
        for _ in range(100):
            r = rng.uniform(*ratio)
            tallest = round(math.sqrt(most / r))
            while round(tallest * r) > width:
                tallest -= 1
            tallest = min(tallest, height)
            h = rng.randint(min(round(math.sqrt(least / r)), tallest), tallest)
            if h * round(h * r) < least:
                h += 1
            if h * round(h * r) > most:
                h -= 1
            w = round(h * r)
            if least <= h * w <= most and 0 < w <= width and 0 < h <= height:
                y = rng.randint(0, height - h - 1) if h < height else 0
                return y, rng.randint(0, width - w - 1) if w < width else 0, h, w
        return 0, 0, height, width

    return np.array([one() for _ in range(count)], float)


def same_distribution(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether means and variances of two samples of boxes agree: area, log aspect, offsets and sides, to 5 sigma."""

    def rows(boxes: np.ndarray, centre: np.ndarray | None = None) -> np.ndarray:
        y, x, h, w = boxes.astype(float).T
        first = np.stack([h * w, np.log(w / h), y, x, h, w])
        centre = first.mean(1, keepdims=True) if centre is None else centre
        return np.concatenate([first, (first - centre) ** 2])

    theirs_rows = rows(theirs)
    ours_rows = rows(ours, theirs_rows[:6].mean(1, keepdims=True))
    error = np.sqrt(theirs_rows.var(1) / len(theirs) + ours_rows.var(1) / len(ours))
    return bool(np.all(np.abs(theirs_rows.mean(1) - ours_rows.mean(1)) <= 5 * error + 1e-9))


@pytest.mark.parametrize("cut", SAMPLERS[:4], ids=lambda c: f"{c.sampler}-{c.scale[0]}")
@pytest.mark.parametrize("size", [(375, 500), (500, 333), (40, 160), (12, 10)])
def test_samplers_follow_their_definitions(cut: Cut, size: tuple[int, int]) -> None:
    count = 8000
    plain = torchvision_boxes if cut.sampler == "torchvision" else tensorflow_boxes
    boxes, _ = to_boxes(draw(recipe(cut), size, count)[0][:, 0])
    assert same_distribution(boxes, plain(*size, cut.scale, cut.ratio, count, random.Random(1)))


def test_the_paper_sampler_is_torchvisions_own() -> None:
    torch.manual_seed(0)
    blank, count, size = torch.empty(3, 375, 500), 4000, (375, 500)
    theirs = np.array([RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)], float)
    boxes, _ = to_boxes(draw(recipe(Cut("a", 1, 32, 2)), size, count)[0][:, 0])
    assert same_distribution(boxes, theirs)


@pytest.mark.parametrize(
    ("cut", "area"), list(zip(SAMPLERS, (0.56, 0.185, 0.53, 0.166), strict=False)), ids=lambda v: str(v)[:12]
)
def test_mean_areas_are_those_of_the_two_codes(cut: Cut, area: float) -> None:
    boxes, _ = to_boxes(draw(recipe(cut), (375, 500), 20000)[0][:, 0])
    assert (boxes[:, 2] * boxes[:, 3]).mean() / (375 * 500) == pytest.approx(area, abs=0.006)


def test_tensorflow_never_draws_the_last_offset_and_torchvision_does() -> None:
    for cut, last in ((SAMPLERS[1], True), (SAMPLERS[3], False)):
        boxes, _ = to_boxes(draw(recipe(cut), (12, 12), 4000)[0][:, 0])
        assert bool((boxes[:, 0] == 12 - boxes[:, 2]).any()) is last


def test_fallbacks_are_the_central_box_and_the_whole_image() -> None:
    tall = (500, 10)
    boxes, _ = to_boxes(draw(recipe(replace(SAMPLERS[0], flip=0)), tall, 50)[0][:, 0])
    assert {tuple(b) for b in boxes.tolist()} == {(243, 0, 13, 10)}  # 13.3 pixels high for aspect 3/4, in the middle
    boxes, _ = to_boxes(draw(recipe(replace(SAMPLERS[2], flip=0)), tall, 50)[0][:, 0])
    assert {tuple(b) for b in boxes.tolist()} == {(0, 0, 500, 10)}


def test_the_centre_is_the_same_square_for_all() -> None:
    windows, params = draw(recipes.evaluation(size=224, resize=256), (375, 500), 3)
    assert windows[:, 0].tolist() == [[23, 86, 351, 414]] * 3  # 328 = 375 * 224 / 256 pixels, unflipped
    assert (params[..., parameters.ORDER] == -1).all()


CROP = recipes.segmentation(size=64, short_side=100)


@pytest.mark.parametrize("size", [(200, 300), (300, 200), (50, 400), (1, 1), (1, 9), (37, 41)])
def test_a_scaled_window_is_the_square_that_the_resized_image_would_be_cropped_to(size: tuple[int, int]) -> None:
    windows, params = draw(CROP, size, 2000)
    (y, x, h, w), flipped = to_boxes(windows[:, 0])[0].T, to_boxes(windows[:, 0])[1]
    assert np.array_equal(h, w) and np.array_equal(np.rint(windows), windows)
    scale = 64 / h * min(size) / 100
    if min(size) > 30:  # else whole pixels are too coarse
        assert 0.48 < scale.min() < 0.53 and 1.9 < scale.max() < 2.1
        assert scale.mean() == pytest.approx(1.25, abs=0.03)
    rows, columns = 64 - params[:, 0, parameters.PAD_ROWS], 64 - params[:, 0, parameters.PAD_COLUMNS]
    inside = np.minimum(y + h, size[0]) - y
    assert (y >= 0).all() and (inside > 0).all()
    assert np.array_equal(rows, np.maximum(1, np.rint(64 * inside / h)))
    inside = np.minimum(x + w, size[1]) - np.maximum(x, 0)
    assert np.where(flipped, x + w <= size[1], x >= 0).all()  # what lies outside is at the right of the view
    assert np.array_equal(columns, np.maximum(1, np.rint(64 * inside / w)))
    assert 800 < flipped.sum() < 1200


def test_another_attempt_moves_a_scaled_window_and_nothing_else() -> None:
    index, sizes = np.arange(300), np.full((300, 2), (300, 400), np.int32)
    table = draws.distributions(CROP)
    (windows, params), (others, same) = (draws.draw(table, 3, 1, index, sizes, k) for k in (0, 4))
    assert np.array_equal(params, same)
    (boxes, flips), (moved, unchanged) = to_boxes(windows[:, 0]), to_boxes(others[:, 0])
    assert np.array_equal(flips, unchanged) and np.array_equal(boxes[:, 2:], moved[:, 2:])
    assert (boxes[:, :2] != moved[:, :2]).any(axis=1).mean() > 0.95
    small = boxes[:, 2] < 200
    places = [found[small, 0] / (301 - found[small, 2]) for found in (boxes, moved)]
    assert small.sum() > 100 and np.abs(np.corrcoef(*places)[0, 1]) < 0.25


def test_mmsegs_operations_come_one_by_one() -> None:
    _, params = draw(CROP, (300, 400), 4000)
    p = params[:, 0].T
    for name, neutral, low, high in (
        (parameters.BRIGHTNESS, 0, -32 / 255, 32 / 255),
        (parameters.CONTRAST, 1, 0.5, 1.5),
        (parameters.SATURATION, 1, 0.5, 1.5),
        (parameters.HUE, 0, -0.1, 0.1),
    ):
        drawn = p[name][p[name] != neutral]
        assert len(drawn) / 4000 == pytest.approx(0.5, abs=0.03)
        assert low <= drawn.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < drawn.max() <= high
    together = (p[parameters.HUE] != 0) & (p[parameters.CONTRAST] != 1)
    assert together.mean() == pytest.approx(0.25, abs=0.03)  # each by a coin of its own
    orders, counts = np.unique(p[parameters.ORDER].astype(int), return_counts=True)
    found = [parameters.PERMUTATIONS[order].tolist() for order in orders]
    brightness, contrast, saturation, hue = 1, 2, 3, 4
    assert found == [[brightness, contrast, saturation, hue], [brightness, saturation, hue, contrast]]
    assert counts[0] / 4000 == pytest.approx(0.5, abs=0.03)


def test_colours_come_at_their_rates_and_within_their_ranges() -> None:
    augmentation = Augmentation(jitter=0.8, gray=0.2, blur=0.5, solarize=0.1, sigma=(0.1, 2.0))
    count = 20000
    windows, params = draw(recipe(Cut("a", 1, 32, 2, flip=0.3, augmentations=(augmentation,))), (50, 60), count)
    p = params[:, 0]
    rates = {
        "jitter": (p[:, parameters.ORDER] >= 0, 0.8),
        "gray": (p[:, parameters.GRAY] == 1, 0.2),
        "blur": (p[:, parameters.SIGMA] > 0, 0.5),
        "solarize": (p[:, parameters.SOLARIZE] == 1, 0.1),
        "flip": (windows[:, 0, 3] < windows[:, 0, 1], 0.3),
    }
    for name, (happened, rate) in rates.items():
        assert happened.mean() == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / count)), name
    together = np.corrcoef([happened for happened, _ in rates.values()]) - np.eye(len(rates))
    assert np.abs(together).max() < 5 / math.sqrt(count)
    orders = np.bincount(p[:, parameters.ORDER][p[:, parameters.ORDER] >= 0].astype(int), minlength=24)
    assert orders.min() > 0.8 * orders.mean() and orders.max() < 1.2 * orders.mean()
    blurred = p[p[:, parameters.SIGMA] > 0]
    for values, low, high in (
        (p[:, parameters.BRIGHTNESS], 0.6, 1.4),
        (p[:, parameters.CONTRAST], 0.6, 1.4),
        (p[:, parameters.SATURATION], 0.8, 1.2),
        (p[:, parameters.HUE], -0.1, 0.1),
        (blurred[:, parameters.SIGMA], 0.1, 2.0),
    ):
        assert low <= values.min() < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=5 * (high - low) / math.sqrt(12 * len(values)))
        assert values.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.03)


def test_colours_alternate_over_views_and_tensorflow_shifts_brightness() -> None:
    _, params = draw(recipes.vicregl(), (375, 500), 400)
    small = params[:, 2:]
    assert (small[:, 0::2, parameters.SIGMA] > 0).all() and (small[:, 0::2, parameters.SOLARIZE] == 0).all()
    assert (small[:, 1::2, parameters.SIGMA] > 0).mean() == pytest.approx(0.1, abs=0.04)
    assert (small[:, 1::2, parameters.SOLARIZE] > 0).mean() == pytest.approx(0.2, abs=0.06)
    assert (params[..., parameters.FILTER] == parameters.BICUBIC_ANTIALIAS).all()
    _, params = draw(recipes.loca("released"), (375, 500), 400)
    brightness = params[..., parameters.BRIGHTNESS]
    assert -0.4 <= brightness.min() < -0.35 and 0.35 < brightness.max() <= 0.4
    assert (params[..., parameters.RULE] == parameters.TENSORFLOW).all() and (params[..., parameters.SIGMA] == 0).all()
    assert (params[..., parameters.FILTER] == parameters.BILINEAR).all()


def test_released_loca_sees_the_statistics_of_its_own_code() -> None:
    """Monte Carlo on ImageNet's most common size; the numbers are those of the released input pipeline."""
    windows, _ = draw(recipes.loca("released"), (375, 500), 6000)
    reference = windows[:, 0]
    query = patch_targets(reference, windows[:, 1:2], reference_grid=14, query_grid=14, query_size=224)
    focal = patch_targets(reference, windows[:, 2:], reference_grid=14, query_grid=6, query_size=96)
    assert (query >= 0).mean() == pytest.approx(0.71, abs=0.01)
    assert (focal >= 0).mean() == pytest.approx(0.74, abs=0.01)
    valid = (focal >= 0).sum(-1)
    assert (valid == 0).mean() == pytest.approx(0.048, abs=0.005)
    assert (valid == 36).mean() == pytest.approx(0.43, abs=0.015)
    kept = 70 / 196  # the trainer keeps 70 of the query's tokens
    tokens = (focal >= 0).sum((1, 2)) + kept * (query >= 0).sum((1, 2))
    assert tokens.mean() == pytest.approx(290, abs=4)
    assert tokens.std() == pytest.approx(64, abs=2)
    prior = np.bincount(focal[focal >= 0], minlength=196) + kept * np.bincount(query[query >= 0], minlength=196)
    prior /= prior.sum()
    assert prior.max() == pytest.approx(0.0091, abs=0.0006)
    assert -(prior * np.log(prior)).sum() == pytest.approx(5.197, abs=0.01)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0.0, 0.2)}, "scale"),
        ({"ratio": (-1.0, 2.0)}, "ratio"),
        ({"flip": 1.5}, "flip"),
        ({"count": 0}, "count"),
        ({"sampler": "random"}, "sampler"),
        ({"interpolation": "bicubic", "antialias": False}, "antialias"),
        ({"augmentations": ()}, "augmentations"),
        ({"augmentations": (Augmentation(jitter=2.0),)}, "jitter"),
        ({"augmentations": (Augmentation(sigma=(0.0, 1.0)),)}, "sigma"),
        ({"augmentations": (Augmentation(hue=0.6),)}, "hue"),
        ({"sampler": "scaled"}, "short_side"),
        ({"sampler": "scaled", "short_side": 9, "scale": (0.0, 2.0)}, "scale .* positive"),
        ({"scale": (0.5, 2.0)}, "scale .* within"),
        ({"most": 0.5}, "most"),
        ({"augmentations": (Augmentation(contrast=-0.1),)}, "contrast"),
        ({"augmentations": (Augmentation(), Augmentation(rule="tensorflow"))}, "rule"),
    ],
)
def test_a_cut_that_cannot_be_drawn_is_named(change, word) -> None:
    with pytest.raises(ValueError, match=rf"'crops'.*{word}"):
        draws.distributions(recipe(replace(Cut("crops", 1, 32, 2), **change)))


def test_bad_sizes_are_refused() -> None:
    distributions = draws.distributions(recipes.plain())
    with pytest.raises(ValueError, match="positive height"):
        draws.draw(distributions, 0, 0, np.arange(1), np.array([[0, 5]], np.int32))
    with pytest.raises(ValueError, match="sizes"):
        draws.draw(distributions, 0, 0, np.arange(2), np.array([[5, 5]], np.int32))
