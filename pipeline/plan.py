"""The host's part of `triton_views`: the inputs of the GPU's kernels besides the images.

Whole-pixel windows, filter weights and Gaussians come from the same functions that the CPU's kernel calls, so both
devices use the same integer weights. Planning costs 25 to 40 us of one core and some 50 kB per image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .cutting import _bounds, blur_weights, resize_weights
from .kernel import kernel
from .parameters import CONTRAST, FILTER, GRAY, ORDER, PERMUTATIONS, RULE, SIGMA, SOLARIZE

if TYPE_CHECKING:
    from .recipes import Cut

# Columns of `Plan.views`.
TOP, LEFT, FLIPPED = range(3)
ROW_TAPS, COLUMN_TAPS = 3, 4  # number of taps for each row and column of the view
ROW_SPANS, COLUMN_SPANS = 5, 6  # index of the first span in `Plan.spans`
ROW_WEIGHTS, COLUMN_WEIGHTS = 7, 8  # index of the first weight in `Plan.weights`
STEPS, BEFORE_CONTRAST, OPERATIONS = 9, 10, 11  # jitter operations: count, count before contrast, first of four
COLOUR_RULE, IS_GRAY, RADIUS, SOLARIZED = 15, 16, 17, 18  # `parameters.RULE`, a flag, the blur's (0: none), a flag
COLUMNS = 19


@dataclass(frozen=True)
class Plan:
    """The inputs of the kernels for a batch, besides its images."""

    widths: NDArray[np.int32]  # (B,): widths of the images
    views: NDArray[np.int32]  # (B, T, COLUMNS)
    factors: NDArray[np.float32]  # (B, T, 4): strengths of the jitter operations, in order of application
    spans: NDArray[np.int32]  # (n, 2): for each row and column, its first source pixel and its rounding offset
    weights: NDArray[np.int16]  # (m,): weights of the taps; 2**14 stands for 1
    gaussians: NDArray[np.int16]  # (B, T, widest): blur weights; 2**14 stands for 1; 2 * RADIUS + 1 of them are used


def plan(
    cuts: "Sequence[Cut]", windows: NDArray[np.float32], params: NDArray[np.float32], sizes: NDArray[np.int32]
) -> Plan:
    """Plan a batch from windows f32 (B, T, 4), parameters f32 (B, T, P) and the images' `sizes` i32 (B, 2)."""
    sides = np.array([cut.size for cut in cuts for _ in range(cut.count)], dtype=np.int64)
    return Plan(np.ascontiguousarray(sizes[:, 1]), *_plan(sides, windows, params, sizes))


@kernel
def _axis(length, side, filtering, spans, weights, at, used):
    """Write one axis of one view at index `at` of spans and `used` of weights. Returns the number of taps per pixel.

    All pixels have the same number of taps, some with weight 0. All taps are inside the window: no load needs a mask.
    """
    first, taps, own = resize_weights(length, side, filtering)
    most = taps.max()
    for i in range(side):
        start = min(first[i], length - most)
        # Half a unit for the final rounding, plus half a fractional bit per tap, since each product is rounded down.
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
            for length in (y1 - y0, x1 - x0):  # an upper bound for all filters
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
            view[COLOUR_RULE], view[IS_GRAY], view[SOLARIZED] = p[RULE], p[GRAY] > 0, p[SOLARIZE] > 0
            if p[SIGMA] > 0:
                gaussian = blur_weights(p[SIGMA])
                view[RADIUS] = len(gaussian) // 2
                gaussians[b, v, : len(gaussian)] = gaussian
    return views, factors, spans, weights[:used], gaussians
