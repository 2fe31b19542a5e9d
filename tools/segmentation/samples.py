"""One pair of files -> the JPEG and the mask that are stored, of one size and turned alike."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from sharding import SourceError, images

from .masks import png
from .pairs import Layout, Pair

_ORIENTATION = 0x0112  # the tag of EXIF


@dataclass(frozen=True)
class Sample:
    """What is stored of a pair."""

    image: images.Sound
    mask: bytes  # PNG
    pixels: NDArray[np.int64]  # (256,): how many of each class, void last


def make(layout: Layout, source: Path, split: str, pair: Pair, rules: images.Rules) -> Sample:
    """Raises images.Refused for a damaged image; SourceError, which names the file, for a mask that is damaged, coded
    in another way than the layout's, or of another size than its image.
    """
    encoding, file = list(layout.masks.values())[pair.encoding], source / pair.mask
    if pair.box is None:
        content, coded = (source / pair.image).read_bytes(), file.read_bytes()
        image = images.examine(content, rules)
        with _named(file):
            mask = encoding.label(encoding.decode(coded))
            if "EXIF orientation" in image.repairs:
                mask = _turned(mask, content, layout.as_stored)
        if layout.oversized:
            mask = mask[: image.height, : image.width]
        _same_size(pair, mask.shape, (image.height, image.width))
    else:
        y0, x0, y1, x1 = pair.box
        tile, tile_mask = _tile(source / pair.image), _tile(file)
        _same_size(pair, tile_mask.shape, tile.shape)
        patch = tile[y0:y1, x0:x1]
        if layout.red_green:
            red, green = (patch[..., channel] for channel in layout.red_green[split])
            patch = np.stack([red, green, ((red.astype(np.uint16) + green) // 2).astype(np.uint8)], axis=-1)
        image = images.examine(png(patch), rules)
        with _named(file):
            mask = encoding.label(tile_mask[y0:y1, x0:x1])
    return Sample(image, png(mask), np.bincount(mask.ravel(), minlength=256))


def _same_size(pair: Pair, mask: tuple[int, ...], image: tuple[int, ...]) -> None:
    if mask[:2] != image[:2]:
        raise SourceError(
            f"{pair.mask} has {mask[1]} x {mask[0]} pixels, its image {pair.image} {image[1]} x {image[0]}"
        )


def _turned(mask: NDArray[np.uint8], content: bytes, as_stored: bool) -> NDArray[np.uint8]:
    """The mask as the image is stored, which was turned as its EXIF orientation says."""
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        orientation = image.getexif()[_ORIENTATION]
    if mask.shape != (height, width):
        return mask  # drawn on the turned image; if it fits neither, the size tells
    if (orientation < 5 or height == width) and not as_stored:
        raise ValueError(
            f"may have been drawn before or after its image is turned (EXIF orientation {orientation}), and their size "
            "does not say which: turn the image for good, or remove that tag"
        )
    picture = Image.fromarray(mask)
    picture.getexif()[_ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(picture))


@lru_cache(maxsize=2)  # an image and its mask, 108 MB each: patches of one tile follow each other
def _tile(file: Path) -> NDArray[np.uint8]:
    """u8 (height, width, 3)."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """What goes wrong with a mask is told with its file's name."""
    try:
        yield
    except (SourceError, MemoryError):
        raise
    except ValueError as error:
        raise SourceError(f"{file} {error}") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... on damaged data, scipy others
        raise SourceError(f"{file} cannot be read: {error}") from None
