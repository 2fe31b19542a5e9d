"""Windows: the parts of stored images that views show.

A window is float32 ``(y0, x0, y1, x1)`` in pixels of the stored image, at pixel edges: the whole image is
``(0, 0, H, W)``. A horizontally flipped view has ``x1 < x0``. The same four numbers cut the pixels and determine which
patches correspond, so pixels and correspondences cannot disagree.
"""

import numpy as np
from numpy.typing import NDArray


def from_boxes(boxes: NDArray[np.integer], flip: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Convert boxes ``(y, x, h, w)`` (..., 4) to windows, flipped where `flip` (...) is true; exact below 2**24."""
    y, x, h, w = np.moveaxis(np.asarray(boxes), -1, 0)
    flip = np.asarray(flip)
    return np.stack([y, np.where(flip, x + w, x), y + h, np.where(flip, x, x + w)], axis=-1).astype(np.float32)


def to_boxes(windows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Convert windows (..., 4) to boxes ``(y, x, h, w)`` (..., 4) and flips (...): the inverse of `from_boxes`."""
    y0, x0, y1, x1 = np.moveaxis(np.asarray(windows, dtype=np.float32), -1, 0)
    return np.stack([y0, np.minimum(x0, x1), y1 - y0, np.abs(x1 - x0)], axis=-1), x1 < x0


def unflipped(windows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the windows without their flips, for location grids that ignore flips."""
    y0, x0, y1, x1 = np.moveaxis(np.asarray(windows, dtype=np.float32), -1, 0)
    return np.stack([y0, np.minimum(x0, x1), y1, np.maximum(x0, x1)], axis=-1)
