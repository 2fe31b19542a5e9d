"""Converts a mask file to class indices, u8 (height, width) with 255 = void, and these to the PNG that is stored.

A file that cannot be a mask of the layout is refused: silently wrong labels cost more than a run that stops.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .classes import VOID

_MOST_PIXELS = 100_000_000  # limit for an image; a tile of ISPRS has 36 million


@dataclass(frozen=True)
class Indices:
    """One channel of numbers: PNG or TIFF of any bit depth, or a MATLAB file (SBD, Pascal Context)."""

    table: Mapping[int, int]  # number in the file -> class or 255; any other number is refused
    palette: bool = False  # True: the indices of a palette PNG are the numbers; False: palette PNGs are refused

    def decode(self, data: bytes) -> NDArray:
        """Return the numbers in the file, (height, width)."""
        if data.startswith(b"MATLAB"):
            return _matlab(data)
        image = _open(data)
        if image.mode == "P" and not self.palette:
            raise ValueError("is a palette PNG instead of class indices: save its indices as a gray PNG")
        if image.mode not in ("P", "1", "L", "I", "I;16", "I;16B"):
            raise ValueError(f"has mode {image.mode}, but class indices need a single channel of integers")
        raw = np.asarray(image)
        if image.format == "PNG" and image.mode == "L":  # Pillow scales 2 and 4 bits to 8
            raw = raw // np.uint8(255 // (2 ** data[24] - 1))
        return raw.astype(np.uint8) if image.mode == "1" else raw

    def label(self, raw: NDArray) -> NDArray[np.uint8]:
        """Return the classes, u8 (height, width)."""
        present = np.unique(raw).tolist()
        if unknown := [number for number in present if number not in self.table]:
            raise ValueError(f"holds the number {unknown[0]}, which stands for no class (void is {VOID})")
        look_up = np.zeros(max(present) + 1, np.uint8)
        for number in present:
            look_up[number] = self.table[number]
        return look_up[raw]


@dataclass(frozen=True)
class Colours:
    """RGB colours, each of which represents a class."""

    table: Mapping[tuple[int, int, int], int]  # colour -> class or 255
    nearest: bool = False  # True: a colour means the nearest one in the table; False: other colours are refused

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """Return the colours, u8 (height, width, 3)."""
        image = _open(data)
        if image.mode not in ("RGB", "RGBA", "P"):
            raise ValueError(f"has no colours ({image.mode}) where colours stand for the classes")
        return np.asarray(image.convert("RGB"))

    def label(self, raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the classes, u8 (height, width)."""
        present, where = np.unique(raw.reshape(-1, 3).astype(np.int32) @ (1 << 16, 1 << 8, 1), return_inverse=True)
        colours = np.stack([present >> 16, present >> 8 & 255, present & 255], axis=1)
        if not self.nearest:
            for colour in map(tuple, colours.tolist()):
                if colour not in self.table:
                    raise ValueError(f"holds the colour {colour}, which stands for no class")
        distance = np.square(colours[:, None] - np.array(list(self.table))).sum(axis=2)
        label = np.array(list(self.table.values()), np.uint8)[distance.argmin(axis=1)]
        return label[where].reshape(raw.shape[:2])


Encoding = Indices | Colours


def png(mask: NDArray[np.uint8]) -> bytes:
    """Encode an optimised 8-bit gray PNG. Its bytes depend only on the mask and on Pillow's zlib."""
    out = io.BytesIO()
    Image.fromarray(mask).save(out, "PNG", optimize=True)
    return out.getvalue()


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "BMP", "TIFF"))
    except Image.UnidentifiedImageError:
        raise ValueError("is no PNG, BMP or TIFF (a JPEG does not keep labels)") from None
    if image.width * image.height > _MOST_PIXELS:
        raise ValueError(f"has {image.width} x {image.height} pixels by its header: more than an image may have")
    return image


def _matlab(data: bytes) -> NDArray:
    """Return the label map of a MATLAB file of SBD or Pascal Context."""
    from scipy.io import loadmat  # slow to import, and most sets never need it

    found = loadmat(io.BytesIO(data), squeeze_me=True, struct_as_record=True)
    if "GTcls" in found:
        return np.asarray(found["GTcls"]["Segmentation"].item()).astype(np.int64)
    if "LabelMap" in found:
        return np.asarray(found["LabelMap"]).astype(np.int64)
    raise ValueError("holds neither GTcls nor LabelMap")
