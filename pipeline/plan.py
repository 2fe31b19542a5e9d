"""What the GPU's kernels read of a batch besides its images: the host's share of `triton_views`.

Whole-pixel windows, filter weights and Gaussians come from the functions that the CPU's kernel calls itself, so both
devices weigh with the same integers. It costs 25 to 40 us of one core and some 50 kB an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .cutting import _bounds, blur_weights, resize_weights
from .kernel import kernel
from .parameters import CONTRAST, FILTER, GRAY, ORDER, PERMUTATIONS, RULE, SIGMA, SOLARIZE, TENSORFLOW

if TYPE_CHECKING:
    from .recipes import Cut

# Columns of `Plan.views`.
TOP, LEFT, FLIPPED = range(3)
ROW_TAPS, COLUMN_TAPS = 3, 4  # of each row and column of the view
ROW_SPANS, COLUMN_SPANS = 5, 6  # where in `Plan.spans` they begin
ROW_WEIGHTS, COLUMN_WEIGHTS = 7, 8  # where in `Plan.weights`
STEPS, BEFORE_CONTRAST, OPERATIONS = 9, 10, 11  # jitter operations, those before the contrast, and four of them in turn
SHIFTED, IS_GRAY, RADIUS, SOLARIZED = 15, 16, 17, 18  # TensorFlow's rule, gray or not, of the blur (0: none), or not
COLUMNS = 19


@dataclass(frozen=True)
class Plan:
    """What the kernels read of a batch besides its images, as the host plans it."""

    widths: NDArray[np.int32]  # (B,): of the images
    views: NDArray[np.int32]  # (B, T, COLUMNS)
    factors: NDArray[np.float32]  # (B, T, 4): of the operations in turn
    spans: NDArray[np.int32]  # (n, 2): of each row and column, the first source pixel and what rounds its sum
    weights: NDArray[np.int16]  # (m,): of their taps; 2**14 weighs 1
    gaussians: NDArray[np.int16]  # (B, T, widest): 2**14 weighs 1; RADIUS says how many count


def plan(
    cuts: "Sequence[Cut]", windows: NDArray[np.float32], params: NDArray[np.float32], sizes: NDArray[np.int32]
) -> Plan:
    """The plan of a batch: windows f32 (B, T, 4), parameters f32 (B, T, P), and `sizes` i32 (B, 2) of the images."""
    sides = np.array([cut.size for cut in cuts for _ in range(cut.count)], dtype=np.int64)
    return Plan(np.ascontiguousarray(sizes[:, 1]), *_plan(sides, windows, params, sizes))


@kernel
def _axis(length, side, filtering, spans, weights, at, used):
    """Writes one axis of one view behind `at` spans and `used` weights; returns the taps of each pixel.

    All have as many, some of weight 0, and all lie within the window: no load needs a mask.
    """
    first, taps, own = resize_weights(length, side, filtering)
    most = taps.max()
    for i in range(side):
        start = min(first[i], length - most)
        # Half a unit for the last rounding; each product is rounded down, by half a fractional bit on average.
        spans[at + i, 0], spans[at + i, 1] = start, 32 + (taps[i] >> 1)
        for k in range(most):
            weights[used + i * most + k] = 0
        for k in range(taps[i]):
            weights[used + i * most + k + first[i] - start] = own[i, k]
    return most


@kernel
def _plan(sides, windows, params, sizes):
    samples, count = windows.shape[0], windows.shape[1]
    views = np.zeros((samples, count, COLUMNS), dtype=np.int32)
    factors = np.zeros((samples, count, 4), dtype=np.float32)
    capacity, widest = 0, 1
    for b in range(samples):
        for v in range(count):
            y0, y1, x0, x1 = _bounds(windows[b, v], sizes[b, 0], sizes[b, 1])
            for length in (y1 - y0, x1 - x0):  # more than any filter takes
                capacity += sides[v] * (2 * np.int64(np.ceil(2 * max(length / sides[v], 1.0))) + 1)
            if params[b, v, SIGMA] > 0:
                widest = max(widest, len(blur_weights(params[b, v, SIGMA])))
    spans = np.empty((samples * 2 * sides.sum(), 2), dtype=np.int32)
    weights = np.empty(capacity, dtype=np.int16)
    gaussians = np.zeros((samples, count, widest), dtype=np.int16)
    at = used = 0
    for b in range(samples):
        for v in range(count):
            view, p, side = views[b, v], params[b, v], sides[v]
            y0, y1, x0, x1 = _bounds(windows[b, v], sizes[b, 0], sizes[b, 1])
            view[TOP], view[LEFT], view[FLIPPED] = y0, x0, windows[b, v, 3] < windows[b, v, 1]
            for axis, length in enumerate((y1 - y0, x1 - x0)):
                most = _axis(length, side, np.int64(p[FILTER]), spans, weights, at, used)
                view[ROW_TAPS + axis], view[ROW_SPANS + axis], view[ROW_WEIGHTS + axis] = most, at, used
                at, used = at + side, used + side * most
            if p[ORDER] >= 0:
                view[STEPS] = 4
                for step in range(4):
                    operation = PERMUTATIONS[np.int64(p[ORDER]), step]
                    view[OPERATIONS + step], factors[b, v, step] = operation, p[operation]
                    if operation == CONTRAST:
                        view[BEFORE_CONTRAST] = step
            view[SHIFTED], view[IS_GRAY], view[SOLARIZED] = p[RULE] == TENSORFLOW, p[GRAY] > 0, p[SOLARIZE] > 0
            if p[SIGMA] > 0:
                gaussian = blur_weights(p[SIGMA])
                view[RADIUS] = len(gaussian) // 2
                gaussians[b, v, : len(gaussian)] = gaussian
    return views, factors, spans, weights[:used], gaussians
