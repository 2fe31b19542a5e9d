"""A window: the part of the stored image that a view shows.

float32 ``(y0, x0, y1, x1)`` in pixels of the stored image, at pixel edges: the whole image is ``(0, 0, H, W)``.
A horizontally flipped view runs backwards: ``x1 < x0``. The same four numbers cut the pixels and decide which patches
correspond, so the two cannot disagree.
"""

import numpy as np
from numpy.typing import NDArray


def from_boxes(boxes: NDArray[np.integer], flip: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Windows of the boxes ``(y, x, h, w)`` (..., 4), flipped where `flip` (...) is true. Exact below 2**24 pixels."""
    y, x, h, w = np.moveaxis(np.asarray(boxes), -1, 0)
    flip = np.asarray(flip)
    return np.stack([y, np.where(flip, x + w, x), y + h, np.where(flip, x, x + w)], axis=-1).astype(np.float32)


def to_boxes(windows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The way back: boxes ``(y, x, h, w)`` (..., 4) and flips (...) of the windows (..., 4)."""
    y0, x0, y1, x1 = np.moveaxis(np.asarray(windows, dtype=np.float32), -1, 0)
    return np.stack([y0, np.minimum(x0, x1), y1 - y0, np.abs(x1 - x0)], axis=-1), x1 < x0


def unflipped(windows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same windows without their flips: what a grid that ignores flips assumes."""
    y0, x0, y1, x1 = np.moveaxis(np.asarray(windows, dtype=np.float32), -1, 0)
    return np.stack([y0, np.minimum(x0, x1), y1, np.maximum(x0, x1)], axis=-1)
