"""Everything random about a view, as a pure function of (seed, epoch, sample, view).

Random numbers come from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), a keyed
bijection of a counter. No state is carried from one view, sample or step to the next. The key is the seed; the counter
is (block, view, epoch, sample). Crops and colours use different blocks, so a recipe that changes its colour
augmentation keeps its windows.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .kernel import kernel
from .parameters import (
    BICUBIC_ANTIALIAS,
    BILINEAR,
    BILINEAR_ANTIALIAS,
    BRIGHTNESS,
    CENTRE,
    CONTRAST,
    CONTRAST_FIRST,
    CONTRAST_LAST,
    FILTER,
    GRAY,
    HUE,
    MMSEG,
    ORDER,
    PAD_COLUMNS,
    PAD_ROWS,
    PARAMS,
    PERMUTATIONS,
    RULE,
    SATURATION,
    SCALED,
    SIGMA,
    SOLARIZE,
    TENSORFLOW,
    TORCHVISION,
)

if TYPE_CHECKING:
    from .recipes import Recipe

_RANGES = ("scale", "ratio", "brightness", "contrast", "saturation", "hue", "sigma")
_PROBABILITIES = ("flip", "jitter", "gray", "blur", "solarize")
_CHOICES = ("sampler", "attempts", "filter", "rule", "size", "short_side")
DISTRIBUTION = np.dtype(
    [(f"{name}_{end}", "<f8") for name in _RANGES for end in ("min", "max")]
    + [(name, "<f8") for name in _PROBABILITIES]
    + [(name, "<i8") for name in _CHOICES]
)
"""The distribution of one view's random numbers: ranges, probabilities and algorithms."""

_FILTERS = {
    ("bilinear", False): BILINEAR,
    ("bilinear", True): BILINEAR_ANTIALIAS,
    ("bicubic", True): BICUBIC_ANTIALIAS,
}
_RULES = {"torchvision": TORCHVISION, "tensorflow": TENSORFLOW, "centre": CENTRE, "scaled": SCALED, "mmseg": MMSEG}
_ATTEMPTS = {TORCHVISION: 10, TENSORFLOW: 100, CENTRE: 0, SCALED: 0}
_COLOUR_BLOCK = 1 << 15  # first block of the colours; crops use blocks from 0


def distributions(recipe: "Recipe") -> NDArray[np.void]:
    """Return the recipe's input for `draw`: DISTRIBUTION (T,), one row per view in the order of the cuts."""
    rows = []
    for cut in recipe.cuts:
        for a in cut.by_view:

            def factor(strength: float) -> tuple[float, float]:
                return max(0.0, 1 - strength), 1 + strength

            shifts = a.rule != "torchvision"
            brightness = (-a.brightness, a.brightness) if shifts else factor(a.brightness)
            jitter = (brightness, factor(a.contrast), factor(a.saturation), (-a.hue, a.hue))
            ranges = (cut.scale, cut.ratio, *jitter, a.sigma)
            chances = (cut.flip, a.jitter, a.gray, a.blur, a.solarize)
            sampler = _RULES[cut.sampler]
            filtering = _FILTERS[cut.interpolation, cut.antialias]
            choices = (sampler, _ATTEMPTS[sampler], filtering, _RULES[a.rule], cut.size, cut.short_side)
            rows.append((*(number for pair in ranges for number in pair), *chances, *choices))
    return np.array(rows, dtype=DISTRIBUTION)


def draw(
    distributions: NDArray[np.void],
    seed: int,
    epoch: int,
    index: NDArray[np.int64],
    sizes: NDArray[np.int32],
    attempt: int = 0,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Draw windows f32 (B, T, 4) and parameters f32 (B, T, PARAMS) for all views of the samples `index` i64 (B,).

    `sizes` i32 (B, 2) holds the height and width of each stored image. Windows have whole numbers and are never empty.
    Only windows of a "scaled" cut may extend beyond the image: below it, and at the right of the view as displayed.
    Another `attempt` moves these windows and changes nothing else. Raises ValueError if a size is not positive or the
    shapes disagree.
    """
    index = np.ascontiguousarray(index, dtype=np.int64)
    sizes = np.ascontiguousarray(sizes, dtype=np.int32)
    if sizes.shape != (*index.shape, 2) or index.ndim != 1:
        raise ValueError(f"sizes {sizes.shape} must be (B, 2) for index (B,), which is {index.shape}")
    if sizes.size and sizes.min() < 1:
        raise ValueError(f"sizes holds {sizes.min()}: every image needs a positive height and width")
    return _draw(distributions, np.uint64(seed & (2**64 - 1)), np.uint64(epoch), index, sizes, attempt)


@kernel
def _multiply(a, b):
    """Return the high and low half of the product of two 32-bit numbers held in uint64."""
    product = a * b
    return product >> np.uint64(32), product & np.uint64(0xFFFFFFFF)


@kernel
def philox(c0, c1, c2, c3, k0, k1):
    """Return Philox4x32-10's four 32-bit words (as uint64) for a counter of four words and a key of two."""
    mask = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        high0, low0 = _multiply(np.uint64(0xD2511F53), c0)
        high1, low1 = _multiply(np.uint64(0xCD9E8D57), c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask
    return c0, c1, c2, c3


@kernel
def _unit(word):
    """Convert a 32-bit word to a float64 in [0, 1)."""
    return np.float64(word) * 2.0**-32


@kernel
def _below(word, n):
    """Convert a 32-bit word to a whole number in [0, n); for n < 2**20 no value is favoured by more than 0.03 %."""
    return np.int64((word * np.uint64(n)) >> np.uint64(32))


@kernel
def _between(word, low, high):
    return low + (high - low) * _unit(word)


@kernel
def _round(x):
    return np.int64(np.rint(x))


@kernel
def _words(seed, epoch, sample, view, block):
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    counter = (np.uint64(view) << np.uint64(16)) | np.uint64(block)
    sample = np.uint64(sample)
    return philox(counter, epoch & mask, sample & mask, sample >> half, seed & mask, seed >> half)


@kernel
def torchvision_box(words, attempt, height, width, scale, ratio):
    """Make one attempt of torchvision's RandomResizedCrop. Returns (found, y, x, h, w).

    The area is uniform, the aspect log-uniform. `attempt` < 0 is the fallback after the last attempt: the largest
    central box of an allowed aspect.
    """
    if attempt < 0:
        h, w = height, width
        if width < ratio[0] * height:
            h = max(1, min(height, _round(width / ratio[0])))
        elif width > ratio[1] * height:
            w = max(1, min(width, _round(height * ratio[1])))
        return True, (height - h) // 2, (width - w) // 2, h, w
    area = _between(words[0], scale[0], scale[1]) * height * width
    aspect = np.exp(_between(words[1], np.log(ratio[0]), np.log(ratio[1])))
    w = _round(np.sqrt(area * aspect))
    h = _round(np.sqrt(area / aspect))
    if not (0 < w <= width and 0 < h <= height):
        return False, 0, 0, 0, 0
    return True, _below(words[2], height - h + 1), _below(words[3], width - w + 1), h, w


@kernel
def tensorflow_box(words, attempt, height, width, scale, ratio):
    """Make one attempt of TensorFlow's sample_distorted_bounding_box. Returns (found, y, x, h, w).

    Aspect and height are uniform. As in TensorFlow, the last possible offset is never drawn. `attempt` < 0 is the
    fallback after the last attempt: the whole image.
    """
    if attempt < 0:
        return True, 0, 0, height, width
    aspect = _between(words[0], ratio[0], ratio[1])
    least, most = scale[0] * height * width, scale[1] * height * width
    h = _round(np.sqrt(least / aspect))
    highest = _round(np.sqrt(most / aspect))
    if _round(highest * aspect) > width:
        highest = np.int64((width + 0.5 - 1e-7) / aspect)
        if _round(highest * aspect) > width:
            highest -= 1
    highest = min(highest, height)
    h = min(h, highest)
    h += _below(words[1], highest - h + 1)
    w = _round(h * aspect)
    if h * w < least:
        h += 1
        w = _round(h * aspect)
    if h * w > most:
        h -= 1
        w = _round(h * aspect)
    if not (least <= h * w <= most and 0 < w <= width and 0 < h <= height):
        return False, 0, 0, 0, 0
    y = _below(words[2], height - h) if h < height else 0
    x = _below(words[3], width - w) if w < width else 0
    return True, y, x, h, w


@kernel
def _box(sampler, attempts, seed, epoch, sample, view, height, width, scale, ratio):
    """Return the box (y, x, h, w) of one view."""
    if sampler == CENTRE:
        side = max(1, _round(min(height, width) * scale[1]))
        return (height - side) // 2, (width - side) // 2, side, side
    for attempt in range(attempts + 1):
        words = _words(seed, epoch, sample, view, attempt + 1)
        number = attempt if attempt < attempts else -1
        if sampler == TORCHVISION:
            found, y, x, h, w = torchvision_box(words, number, height, width, scale, ratio)
        else:
            found, y, x, h, w = tensorflow_box(words, number, height, width, scale, ratio)
        if found:
            break
    return y, x, h, w


@kernel
def _scaled_box(seed, epoch, sample, view, height, width, d, attempt):
    """Return the box (y, x, h, w) of a "scaled" view: a square of the image resized by a drawn factor."""
    factor = _between(_words(seed, epoch, sample, view, 1)[0], d["scale_min"], d["scale_max"])
    side = max(1, _round(d["size"] * min(height, width) / (factor * d["short_side"])))
    words = _words(seed, epoch, sample, view, 2 + attempt)
    y, x = _below(words[0], max(height - side, 0) + 1), _below(words[1], max(width - side, 0) + 1)
    return y, x, side, side


@kernel
def _outside(start, length, limit, size):
    """Return how many of a view's `size` rows or columns are padding; at least one is not.

    The view shows `length` stored pixels from `start`. Those from `limit` on are outside the image.
    """
    return size - max(1, _round(size * min(limit - start, length) / length))


@kernel
def _draw(distributions, seed, epoch, index, sizes, attempt):
    samples, views = len(index), len(distributions)
    windows = np.empty((samples, views, 4), dtype=np.float32)
    params = np.zeros((samples, views, PARAMS), dtype=np.float32)
    for b in range(samples):
        height, width = np.int64(sizes[b, 0]), np.int64(sizes[b, 1])
        for v in range(views):
            d = distributions[v]
            scale, ratio = (d["scale_min"], d["scale_max"]), (d["ratio_min"], d["ratio_max"])
            flipped = _unit(_words(seed, epoch, index[b], v, 0)[0]) < d["flip"]
            if d["sampler"] == SCALED:
                y, x, h, w = _scaled_box(seed, epoch, index[b], v, height, width, d, attempt)
                params[b, v, PAD_ROWS] = _outside(y, h, height, d["size"])
                params[b, v, PAD_COLUMNS] = _outside(x, w, width, d["size"])
                x = min(x, width - w) if flipped else x  # keeps the padding at the right of the flipped view
            else:
                y, x, h, w = _box(d["sampler"], d["attempts"], seed, epoch, index[b], v, height, width, scale, ratio)
            windows[b, v, 0] = y
            windows[b, v, 1] = x + w if flipped else x
            windows[b, v, 2] = y + h
            windows[b, v, 3] = x if flipped else x + w

            first = _words(seed, epoch, index[b], v, _COLOUR_BLOCK)
            second = _words(seed, epoch, index[b], v, _COLOUR_BLOCK + 1)
            third = _words(seed, epoch, index[b], v, _COLOUR_BLOCK + 2)
            p = params[b, v]
            p[ORDER] = _below(first[1], len(PERMUTATIONS)) if _unit(first[0]) < d["jitter"] else -1
            p[BRIGHTNESS] = _between(first[2], d["brightness_min"], d["brightness_max"])
            p[CONTRAST] = _between(first[3], d["contrast_min"], d["contrast_max"])
            p[SATURATION] = _between(second[0], d["saturation_min"], d["saturation_max"])
            p[HUE] = _between(second[1], d["hue_min"], d["hue_max"])
            p[GRAY] = _unit(second[2]) < d["gray"]
            p[SIGMA] = _between(third[0], d["sigma_min"], d["sigma_max"]) if _unit(second[3]) < d["blur"] else 0.0
            p[SOLARIZE] = _unit(third[1]) < d["solarize"]
            p[FILTER] = d["filter"]
            p[RULE] = d["rule"]
            if d["rule"] == MMSEG and d["jitter"] > 0:  # each operation has its own probability
                chances = _words(seed, epoch, index[b], v, _COLOUR_BLOCK + 3)
                p[ORDER] = CONTRAST_FIRST if _unit(third[2]) < 0.5 else CONTRAST_LAST
                for k in range(4):
                    if _unit(chances[k]) >= d["jitter"]:
                        p[BRIGHTNESS + k] = 1.0 if k in (1, 2) else 0.0
    return windows, params
