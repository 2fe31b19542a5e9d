"""Label maps: the class of every pixel of an image, stored as a PNG of one channel beside it.

They are decoded and cut on the host, whatever cuts the images: decoders of photographs would turn a palette's indices
into colours, and a mask of a view's size is small to copy. The nearest pixel is exact, so all devices agree.
"""

import io
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .cutting import cut_mask
from .parameters import VOID
from .recipes import Cut

ATTEMPTS = 10  # windows that are tried for a view of several classes; the last one is kept


def decode_mask(data: bytes) -> NDArray[np.uint8]:
    """The class indices u8 (H, W) of a stored label map; a palette counts by its indices, its colours mean nothing.

    Raises ValueError where it has colours, more than 8 bits, or cannot be decoded as a PNG.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            mode, values = image.mode, np.asarray(image)
    except Exception as error:  # whatever a decoder raises on damaged bytes
        raise ValueError(f"its mask cannot be decoded: {error}") from None
    if mode not in ("1", "L", "P"):
        raise ValueError("its mask has more than 8 bits a pixel" if "I" in mode else f"its mask has colours ({mode})")
    bits = data[24]
    if mode == "L" and bits < 8:  # Pillow stretches them to 0..255
        values = values // (255 // (2**bits - 1))
    return values.astype(np.uint8)


def cut_masks(
    cuts: Sequence[Cut],
    masks: Sequence[NDArray[np.uint8]],
    windows: NDArray[np.float32],
    params: NDArray[np.float32],
    redraw: Callable[[int], NDArray[np.float32]],
) -> dict[str, NDArray[np.uint8]]:
    """The views' masks by kind, u8 (B, V, S, S), of B masks u8 (H, W).

    `windows` f32 (B, T, 4) and `params` f32 (B, T, PARAMS) are those of all views. A window in which one class has more
    than the cut's `most` of the labelled pixels gives way to that of the next attempt, in place: `redraw` gives all
    windows of an attempt.
    """
    others: dict[int, NDArray[np.float32]] = {}
    by_kind, done = {}, 0
    for cut in cuts:
        views = np.empty((len(masks), cut.count, cut.size, cut.size), np.uint8)
        for b, mask in enumerate(masks):
            for v in range(cut.count):
                at = b, done + v
                for attempt in range(ATTEMPTS):
                    if attempt:
                        if attempt not in others:
                            others[attempt] = redraw(attempt)
                        windows[at] = others[attempt][at]
                    cut_mask(views[b, v], mask, windows[at], params[at])
                    if cut.most >= 1 or largest_share(views[b, v]) < cut.most:
                        break
        by_kind[cut.kind] = views
        done += cut.count
    return by_kind


def largest_share(mask: NDArray[np.uint8]) -> float:
    """The share of the labelled pixels that the most frequent class has; 1 where none is labelled."""
    counts = np.bincount(mask.ravel(), minlength=VOID + 1)[:VOID]
    return counts.max() / max(counts.sum(), 1) if counts.any() else 1.0
