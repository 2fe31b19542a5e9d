"""The CPU kernel that cuts and augments all views of one decoded image.

A view is cropped first and then resized, so no pixel outside its window is read. Its parameters determine the
augmentation: jitter, gray, blur, solarize. Resize and blur use one primitive, the weighted sum of rows of bytes:

    image rows --weigh--> S rows of the window --transpose--> columns --weigh--> S columns, flipped or not
    --jitter, gray--> --weigh (blur)--> --transpose--> interleaved rows --weigh (blur)--> view --solarize-->

Columns are stored as (x, channel, y). A column is contiguous, over all channels and within each channel, and one
transpose yields interleaved pixels. The steps pass bytes, as in Pillow: each rounds to a whole level once. The whole
jitter, including gray, is one step (`jitter`).

Nothing here raises, creates Python objects or needs the GIL, so DALI's numba operator can call it.
"""

import numpy as np

from .jitter import LANES, jitter_and_gray
from .kernel import kernel
from .parameters import (
    BICUBIC_ANTIALIAS,
    BILINEAR,
    FILTER,
    GRAY,
    ORDER,
    PAD_COLUMNS,
    PAD_ROWS,
    PADDING,
    RADII,
    SIGMA,
    SOLARIZE,
    VOID,
)
from .simd import TALL, transpose, weigh


@kernel
def _bicubic(x):
    """Evaluate Keys' cubic with a = -0.5, as in Pillow."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    if x < 2:
        return ((-0.5 * x + 2.5) * x - 4) * x + 2
    return 0.0


@kernel
def resize_weights(length, size, filtering):
    """Compute the filter that resizes `length` pixels to `size`.

    Returns each output pixel's first source pixel and number of taps, i64 (size,), and weights i16 (size, max_taps),
    where 2**14 stands for 1. Pixel centres are at half-integers. When shrinking, antialiased filters are widened by the
    scale, as in Pillow.
    """
    scale = length / size
    widening = 1.0 if filtering == BILINEAR else max(scale, 1.0)
    narrowing = 1 / widening
    support = (2.0 if filtering == BICUBIC_ANTIALIAS else 1.0) * widening
    max_taps = min(length, int(np.ceil(support)) * 2 + 1)
    first = np.empty(size, dtype=np.int64)
    taps = np.empty(size, dtype=np.int64)
    weights = np.empty((size, max_taps), dtype=np.int16)
    exact = np.empty(max_taps)
    for i in range(size):
        centre = (i + 0.5) * scale
        if filtering == BILINEAR:  # without antialiasing, samples beyond the edge repeat the edge pixel
            centre = min(max(centre, 0.5), length - 0.5)
        low = max(int(centre - support + 0.5), 0)
        count = min(int(centre + support + 0.5), length) - low
        total = 0.0
        for k in range(count):
            x = (low + k + 0.5 - centre) * narrowing
            weight = _bicubic(x) if filtering == BICUBIC_ANTIALIAS else max(1.0 - abs(x), 0.0)
            exact[k] = weight
            total += weight
        unit = 16384 / total
        for k in range(count):
            weights[i, k] = np.int16(np.rint(exact[k] * unit))
        first[i], taps[i] = low, count
    return first, taps, weights


@kernel
def blur_weights(sigma):
    """Return the Gaussian at whole pixels within RADII sigmas, i16 (2 radius + 1,); 2**14 stands for 1."""
    radius = max(1, int(np.ceil(RADII * sigma)))
    weights = np.empty(2 * radius + 1, dtype=np.int16)
    total = 0.0
    for k in range(-radius, radius + 1):
        total += np.exp(-0.5 * (k / sigma) ** 2)
    for k in range(-radius, radius + 1):
        weights[k + radius] = np.int16(np.rint(np.exp(-0.5 * (k / sigma) ** 2) / total * 16384))
    return weights


@kernel
def _bounds(window, height, width):
    """Return the part of the window inside the image in whole pixels (y0, y1, x0, x1); at least one pixel."""
    low_x, high_x = min(window[1], window[3]), max(window[1], window[3])
    y0, y1 = _within(window[0], window[2], height)
    x0, x1 = _within(low_x, high_x, width)
    return y0, y1, x0, x1


@kernel
def _within(low, high, length):
    start = np.int64(low) if 0 < low < length else (0 if not low >= length else length - 1)
    stop = np.int64(np.ceil(high)) if 0 < high < length else (length if high >= length else 0)
    return start, max(stop, start + 1)


@kernel
def _columns(columns, image, bounds, flipped, shape, filtering):
    """Resize the window of `image` into `columns` u8 (size, 3 * padded): (x, channel, y), reversed if flipped.

    The result has `shape`, (rows, columns). Its last row and column are repeated to fill `columns`.
    """
    y0, y1, x0, x1 = bounds
    padded = columns.shape[1] // 3
    row = image.reshape(image.shape[0], image.shape[1] * 3)[:, 3 * x0 : 3 * x1]
    turned = np.empty((3 * (x1 - x0), padded), dtype=np.uint8)
    strip = np.empty((TALL, 3 * (x1 - x0)), dtype=np.uint8)
    clips = filtering == BICUBIC_ANTIALIAS  # only these weights can be negative
    first, taps, weights = resize_weights(y1 - y0, shape[0], filtering)
    for y in range(0, padded, TALL):
        i = min(y, shape[0] - 1)
        weigh(strip, row[y0:], first[i:], taps[i:], weights[i:], clips)
        transpose(turned[:, y : y + TALL], strip)
    first, taps, weights = resize_weights(x1 - x0, shape[1], filtering)
    inner = columns[: shape[1]]
    weigh(inner[::-1] if flipped else inner, turned.reshape(x1 - x0, 3 * padded), first, taps, weights, clips)
    columns[shape[1] :] = columns[shape[1] - 1]


@kernel
def _extend(rows, radius):
    """Fill `radius` rows at either end with copies of the nearest row between them."""
    last = len(rows) - 1 - radius
    for k in range(radius):
        for j in range(rows.shape[1]):
            rows[k, j] = rows[radius, j]
            rows[last + 1 + k, j] = rows[last, j]


@kernel
def cut_view(out, image, window, p):
    """Cut one view u8 (S, S, 3) of `image` u8 (H, W, 3) by a window f32 (4,) and parameters f32 (PARAMS,)."""
    size = out.shape[0]
    padded = max((size + TALL - 1) // TALL * TALL, LANES)
    height, width = image.shape[0], image.shape[1]
    rows = out.reshape(size, 3 * size)
    weights = blur_weights(p[SIGMA]) if p[SIGMA] > 0 else np.empty(1, dtype=np.int16)
    taps = len(weights)
    radius = taps // 2
    framed = np.empty((size + 2 * radius, 3 * padded), dtype=np.uint8)
    columns = framed[radius : radius + size]
    shape = size - np.int64(p[PAD_ROWS]), size - np.int64(p[PAD_COLUMNS])
    _columns(columns, image, _bounds(window, height, width), window[3] < window[1], shape, np.int64(p[FILTER]))
    if p[ORDER] >= 0 or p[GRAY] > 0:
        jitter_and_gray(columns, size, p)
    if radius:
        _extend(framed, radius)
        blurred = np.empty((size, 3 * padded), dtype=np.uint8)
        each, count, same = np.arange(size), np.full(1, taps), weights.reshape(1, taps)
        weigh(blurred, framed, each, count, same, False)
        turned = np.empty((size + 2 * radius, 3 * size), dtype=np.uint8)
        transpose(turned[radius : radius + size], blurred.reshape(3 * size, padded)[:, :size])
        _extend(turned, radius)
        weigh(rows, turned, each, count, same, False)
    else:
        transpose(rows, columns.reshape(3 * size, padded)[:, :size])
    if p[SOLARIZE] > 0:
        for y in range(size):
            for i in range(3 * size):
                rows[y, i] = min(rows[y, i], np.uint8(255) - rows[y, i])
    if shape[0] < size or shape[1] < size:
        for y in range(size):
            for x in range(shape[1] if y < shape[0] else 0, size):
                for c in range(3):
                    out[y, x, c] = PADDING[c]


@kernel
def cut_image(outputs, image, windows, params):
    """Cut all views of one image into a tuple of u8 (V, S, S, 3), by windows f32 (T, 4) and params f32 (T, PARAMS)."""
    done = 0
    for out in outputs:
        for view in range(len(out)):
            cut_view(out[view], image, windows[done + view], params[done + view])
        done += len(out)


@kernel
def look_up(out, pixels, table):
    """Set out[channel, y, x] = table (3, 256)[channel, level] for pixels u8 (H, W, 3); the table may have any dtype."""
    for c in range(3):
        words = table[c]
        for y in range(len(pixels)):
            row, target = pixels[y], out[c, y]
            for x in range(len(row)):
                target[x] = words[row[x, c]]


@kernel
def cut_mask(out, mask, window, p):
    """Cut one view u8 (S, S) of class indices `mask` u8 (H, W) by a window f32 (4,) and parameters f32 (PARAMS,).

    Each pixel takes the nearest class, or VOID outside the image.
    """
    size = out.shape[0]
    rows, columns = size - np.int64(p[PAD_ROWS]), size - np.int64(p[PAD_COLUMNS])
    y0, y1, x0, x1 = _bounds(window, mask.shape[0], mask.shape[1])
    out[rows:] = VOID
    out[:, columns:] = VOID
    for y in range(rows):
        row = mask[y0 + (2 * y + 1) * (y1 - y0) // (2 * rows)]
        for x in range(columns):
            i = columns - 1 - x if window[3] < window[1] else x
            out[y, x] = row[x0 + (2 * i + 1) * (x1 - x0) // (2 * columns)]
