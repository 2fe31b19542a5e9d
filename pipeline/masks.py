"""Label maps: the class of every pixel of an image, stored beside it as a PNG of one channel.

They are always decoded and cut on the host. DALI's image decoders would turn palette indices into colours, and a mask
of a view's size is cheap to copy. Masks take the nearest pixel, which is exact, so all devices agree.
"""

import io
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .cutting import cut_mask
from .parameters import VOID
from .recipes import Cut

ATTEMPTS = 10  # windows to try until no class reaches the cut's `most`; the last one is kept


def decode_mask(data: bytes) -> NDArray[np.uint8]:
    """Decode a stored label map to class indices u8 (H, W). For a palette image these are the palette's indices.

    Raises ValueError if the map has colour channels or more than 8 bits, or cannot be decoded as a PNG.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            mode, values = image.mode, np.asarray(image)
    except UnidentifiedImageError:
        raise ValueError("its mask is no PNG") from None
    except Exception as error:  # decoders raise many types on damaged bytes
        raise ValueError(f"its mask cannot be decoded: {error}") from None
    if mode not in ("1", "L", "P"):
        raise ValueError("its mask has more than 8 bits a pixel" if "I" in mode else f"its mask has colours ({mode})")
    bits = data[24]
    if mode == "L" and bits < 8:  # Pillow scales the values to 0..255
        values = values // (255 // (2**bits - 1))
    return values.astype(np.uint8)


def cut_masks(
    cuts: Sequence[Cut],
    masks: Sequence[NDArray[np.uint8]],
    windows: NDArray[np.float32],
    params: NDArray[np.float32],
    redraw: Callable[[int], NDArray[np.float32]],
) -> dict[str, NDArray[np.uint8]]:
    """Cut B masks u8 (H, W) into the views' masks by kind, u8 (B, V, S, S).

    `windows` f32 (B, T, 4) and `params` f32 (B, T, PARAMS) hold all views. If one class has the cut's `most` or more of
    the labelled pixels, the next attempt's window replaces the window in place. `redraw` returns all windows of an
    attempt.
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
    """Return the most frequent class's share of the labelled pixels; 1 if none is labelled."""
    counts = np.bincount(mask.ravel(), minlength=VOID + 1)[:VOID]
    return counts.max() / max(counts.sum(), 1) if counts.any() else 1.0
