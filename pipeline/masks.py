"""Label maps: the class of every pixel of an image, stored as a PNG of one channel beside it.

They are decoded and cut on the host, whatever cuts the images: decoders of photographs would turn a palette's indices
into colours, and a mask of a view's size is small to copy. The nearest pixel is exact, so all devices agree.
"""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .cutting import cut_mask
from .recipes import Cut


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
    cuts: Sequence[Cut], masks: Sequence[NDArray[np.uint8]], windows: NDArray[np.float32]
) -> dict[str, NDArray[np.uint8]]:
    """The views' masks by kind, u8 (B, V, S, S), of B masks u8 (H, W) and the windows f32 (B, T, 4) of all views."""
    by_kind, done = {}, 0
    for cut in cuts:
        views = np.empty((len(masks), cut.count, cut.size, cut.size), np.uint8)
        for b, mask in enumerate(masks):
            for v in range(cut.count):
                cut_mask(views[b, v], mask, windows[b, done + v])
        by_kind[cut.kind] = views
        done += cut.count
    return by_kind
