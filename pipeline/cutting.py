"""One decoded image in, all views out: the CPU's pixels.

A view is resized inside its window (crop first, then resize: no pixel outside the window is read), then augmented as
its parameters say: jitter, gray, blur, solarize. Everything but the jitter is one primitive, the weighted sum of
rows of bytes:

    image rows --weigh--> S rows of the window --transpose--> columns --weigh--> S columns, flipped or not
    --jitter, gray--> --weigh (blur)--> --transpose--> interleaved rows --weigh (blur)--> view --solarize-->

Columns lie as (x, channel, y), so that a column of all channels is one contiguous row, a channel of it is another, and
one transpose yields interleaved pixels. Steps hand bytes on, as Pillow does: each rounds to a whole level once. The
whole jitter, gray included, is one step: float32 without rounding in between.

Nothing here raises, makes Python objects or needs the interpreter lock, so that DALI's numba operator can call it.
"""

import numpy as np

from .kernel import kernel
from .parameters import (
    BICUBIC_ANTIALIAS,
    BILINEAR,
    BRIGHTNESS,
    CONTRAST,
    FILTER,
    GRAY,
    HUE,
    LUMA,
    MMSEG,
    ORDER,
    PAD_COLUMNS,
    PAD_ROWS,
    PADDING,
    PERMUTATIONS,
    RADII,
    RULE,
    SATURATION,
    SIGMA,
    SOLARIZE,
    TENSORFLOW,
    TORCHVISION,
    VOID,
)
from .simd import transpose, weigh


@kernel
def _bicubic(x):
    """Keys' cubic with a = -0.5, as Pillow's."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    if x < 2:
        return ((-0.5 * x + 2.5) * x - 4) * x + 2
    return 0.0


@kernel
def resize_weights(length, size, filtering):
    """How `length` pixels become `size`: first source pixel and taps i64 (size,), weights i16 (size, max_taps).

    Antialiased filters are widened by the scale when shrinking, as Pillow does; half-pixel centres; 2**14 weighs 1.
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
        if filtering == BILINEAR:  # without antialiasing a sample beyond the edge is the edge
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
    """The Gaussian at whole pixels within RADII sigmas, i16 (2 radius + 1,)."""
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
    """Whole pixels (y0, y1, x0, x1) of the window inside the image: at least one, whatever the window says."""
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
    """Resizes the window of `image` into `columns` u8 (size, 3 * padded): (x, channel, y), reversed if flipped.

    To `shape`, rows and columns; the last ones are repeated where that is less.
    """
    y0, y1, x0, x1 = bounds
    padded = columns.shape[1] // 3
    row = image.reshape(image.shape[0], image.shape[1] * 3)[:, 3 * x0 : 3 * x1]
    turned = np.empty((3 * (x1 - x0), padded), dtype=np.uint8)
    strip = np.empty((16, 3 * (x1 - x0)), dtype=np.uint8)
    first, taps, weights = resize_weights(y1 - y0, shape[0], filtering)
    for y in range(padded):
        i = min(y, shape[0] - 1)
        weigh(strip[y % 16], row[y0 + first[i] :], weights[i], taps[i])
        if y % 16 == 15:
            transpose(turned[:, y - 15 : y + 1], strip)
    turned = turned.reshape(x1 - x0, 3 * padded)
    first, taps, weights = resize_weights(x1 - x0, shape[1], filtering)
    for x in range(len(columns)):
        i = min(x, shape[1] - 1)
        i = shape[1] - 1 - i if flipped else i
        weigh(columns[x], turned[first[i] :], weights[i], taps[i])


@kernel
def _affine(channels, factor, offsets):
    """Brightness and contrast of either rule: each channel times the factor, plus its offset, clipped."""
    for c in range(3):
        channel, offset = channels[c], offsets[c]
        for i in range(len(channel)):
            channel[i] = min(max(channel[i] * factor + offset, np.float32(0)), np.float32(255))


@kernel
def _luma(r, g, b):
    return np.float32(LUMA[0]) * r + np.float32(LUMA[1]) * g + np.float32(LUMA[2]) * b


@kernel
def _saturate(r, g, b, factor):
    """Each pixel moved from its own gray by the factor, then clipped."""
    rest = np.float32(1) - factor
    for i in range(len(r)):
        gray = rest * _luma(r[i], g[i], b[i])
        r[i] = min(max(r[i] * factor + gray, np.float32(0)), np.float32(255))
        g[i] = min(max(g[i] * factor + gray, np.float32(0)), np.float32(255))
        b[i] = min(max(b[i] * factor + gray, np.float32(0)), np.float32(255))


@kernel
def _saturate_hsv(r, g, b, factor):
    """HSV's saturation times the factor, at most 1; value and hue stay."""
    for i in range(len(r)):
        value = max(r[i], g[i], b[i])
        chroma = value - min(r[i], g[i], b[i])
        gain = min(factor, value / max(chroma, np.float32(1e-6)))
        r[i] = value - (value - r[i]) * gain
        g[i] = value - (value - g[i]) * gain
        b[i] = value - (value - b[i]) * gain


@kernel
def _turn_hue(r, g, b, shift):
    """HSV's hue moved by `shift` of the circle = 1; value and saturation stay."""
    zero, one, two, six = np.float32(0), np.float32(1), np.float32(2), np.float32(6)
    turn = six * (shift - np.rint(shift))
    for i in range(len(r)):
        value = max(r[i], g[i], b[i])
        least = min(r[i], g[i], b[i])
        chroma = value - least
        # Hue in sixths of the circle, from -1 (red towards blue) to 5.
        over = b[i] - r[i] if g[i] == value else r[i] - g[i]
        sector = two if g[i] == value else np.float32(4)
        over = g[i] - b[i] if r[i] == value else over
        sector = zero if r[i] == value else sector
        hue = sector + over / max(chroma, np.float32(1e-6)) + turn
        hue = hue + six if hue < zero else hue
        hue = hue - six if hue >= six else hue
        # A channel rises over the least by the chroma times a trapezium of its distance round the circle.
        r[i] = least + chroma * max(zero, min(one, abs(hue - np.float32(3)) - one))
        g[i] = least + chroma * max(zero, min(one, two - abs(hue - two)))
        b[i] = least + chroma * max(zero, min(one, two - abs(hue - np.float32(4))))


@kernel
def _offsets(p, operation, factor, means):
    """What `_affine` adds: means f32 (3,) are those of the channels before the contrast."""
    offsets = np.zeros(3, dtype=np.float32)
    for c in range(3):
        if operation == CONTRAST and p[RULE] == MMSEG:
            continue  # away from black
        if operation == CONTRAST:
            mean = means[c] if p[RULE] == TENSORFLOW else _luma(means[0], means[1], means[2])
            offsets[c] = (np.float32(1) - factor) * mean
        elif p[RULE] != TORCHVISION:
            offsets[c] = np.float32(255) * factor
    return offsets


@kernel
def _jitter(channels, p, start, stop, means):
    """Operations start..stop-1 of the drawn order on channels f32 (3, n) in levels."""
    r, g, b = channels[0], channels[1], channels[2]
    shifted = p[RULE] != TORCHVISION
    for step in range(start, stop):
        operation = PERMUTATIONS[np.int64(p[ORDER]), step]
        factor = p[operation]
        if operation == HUE:
            _turn_hue(r, g, b, factor)
        elif operation == SATURATION and shifted:
            _saturate_hsv(r, g, b, factor)
        elif operation == SATURATION:
            _saturate(r, g, b, factor)
        else:
            offsets = _offsets(p, operation, factor, means)
            _affine(channels, np.float32(1) if operation == BRIGHTNESS and shifted else factor, offsets)


@kernel
def _jitter_and_gray(columns, size, p):
    """Jitter and gray, in place: up to the contrast, which needs the mean of what precedes it, then the rest."""
    padded = columns.shape[1] // 3
    channels = np.empty((size, 3, size), dtype=np.float32)
    totals = np.zeros((3, size), dtype=np.float32)
    means = np.zeros(3, dtype=np.float32)
    contrast = stop = 0
    if p[ORDER] >= 0:
        stop = 4
        while PERMUTATIONS[np.int64(p[ORDER]), contrast] != CONTRAST:
            contrast += 1
    for x in range(size):
        for c in range(3):
            channel, source = channels[x, c], columns[x, c * padded : c * padded + size]
            for i in range(size):
                channel[i] = np.float32(source[i])
        _jitter(channels[x], p, 0, contrast, means)
        for c in range(3):
            channel, total = channels[x, c], totals[c]
            for i in range(size):
                total[i] += channel[i]
    for c in range(3):
        means[c] = totals[c].sum() / (size * size)
    for x in range(size):
        _jitter(channels[x], p, contrast, stop, means)
        _store(columns[x], channels[x], p[GRAY] > 0)


@kernel
def _store(column, channels, gray):
    """Channels f32 (3, n) in levels, rounded, as one column."""
    padded = len(column) // 3
    r, g, b = channels[0], channels[1], channels[2]
    if gray:
        for i in range(len(r)):
            r[i] = _luma(r[i], g[i], b[i])
    for c in range(3):
        channel, target = r if gray else channels[c], column[c * padded : (c + 1) * padded]
        for i in range(len(channel)):
            target[i] = np.uint8(np.int32(channel[i] + np.float32(0.5)))


@kernel
def _extend(rows, radius):
    """Repeats the first and the last of the middle rows outwards."""
    last = len(rows) - 1 - radius
    for k in range(radius):
        for j in range(rows.shape[1]):
            rows[k, j] = rows[radius, j]
            rows[last + 1 + k, j] = rows[last, j]


@kernel
def cut_view(out, image, window, p):
    """One view u8 (S, S, 3) of `image` u8 (H, W, 3), as window f32 (4,) and parameters f32 (PARAMS,) say."""
    size = out.shape[0]
    padded = (size + 15) // 16 * 16
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
        _jitter_and_gray(columns, size, p)
    if radius:
        _extend(framed, radius)
        blurred = np.empty((size, 3 * padded), dtype=np.uint8)
        for x in range(size):
            weigh(blurred[x], framed[x:], weights, taps)
        turned = np.empty((size + 2 * radius, 3 * size), dtype=np.uint8)
        transpose(turned[radius : radius + size], blurred.reshape(3 * size, padded)[:, :size])
        _extend(turned, radius)
        for y in range(size):
            weigh(rows[y], turned[y:], weights, taps)
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
    """All views of one image, a tuple of u8 (V, S, S, 3); windows f32 (T, 4) and params f32 (T, PARAMS) in turn."""
    done = 0
    for out in outputs:
        for view in range(len(out)):
            cut_view(out[view], image, windows[done + view], params[done + view])
        done += len(out)


@kernel
def look_up(out, pixels, table):
    """out[channel, y, x] = table (3, 256)[channel, level] for pixels u8 (H, W, 3); elements are of any type."""
    for c in range(3):
        words = table[c]
        for y in range(len(pixels)):
            row, target = pixels[y], out[c, y]
            for x in range(len(row)):
                target[x] = words[row[x, c]]


@kernel
def cut_mask(out, mask, window, p):
    """One view u8 (S, S) of class indices `mask` u8 (H, W), as window f32 (4,) and parameters f32 (PARAMS,) say.

    Each place's nearest pixel, VOID outside the image.
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
