"""Makes shards of pairs: verifies each image, converts each mask, and ensures equal size and rotation."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from sharding import SourceError, images, printable
from sharding.samples import persistent
from sharding.target import Target
from sharding.writer import Quarantined, Sample

from .masks import png
from .pairs import Box, Layout, Pair
from .statistics import sums

MEMBERS = ("jpg", "seg.png", "cls", "json")  # cls is -1: timm requires a class of every sample
_ORIENTATION = 0x0112  # EXIF tag


@dataclass(frozen=True)
class ShardMaker:
    """Makes shards of a split; pickled to workers."""

    target: Target
    layout: Layout
    source: Path
    pairs: list[Pair]
    bounds: list[int]  # shard s holds pairs[bounds[s]:bounds[s + 1]]
    rules: images.Rules

    def __call__(self, shard: int) -> dict[str, Any]:
        pairs = self.pairs[self.bounds[shard] : self.bounds[shard + 1]]
        return self.target.make(shard, map(self._sample, pairs))

    def count(self, shards: list[int]) -> int:
        return sum(self.bounds[shard + 1] - self.bounds[shard] for shard in shards)

    def _sample(self, pair: Pair) -> Sample | Quarantined:
        """Return the sample, or a quarantine entry for a damaged image.

        Raises SourceError that names the file if a mask is damaged, has another coding than the layout's, or differs in
        size from its image.
        """
        try:
            image, mask = self._patch(pair, pair.box) if pair.box else self._whole(pair)
        except images.Refused as refusal:
            return Quarantined(pair.key, str(refusal), printable(pair.image))
        metadata = {"filename": printable(pair.image), "label": -1, "height": image.height, "width": image.width}
        if image.repairs:
            metadata["repaired"] = list(image.repairs)
        members = zip(MEMBERS, (image.content, png(mask), b"-1", json.dumps(metadata).encode()), strict=True)
        counts = {"repairs": image.repairs, "notes": image.notes, "sums": sums(mask)}
        return Sample(pair.key, tuple(members), image.height, image.width, **counts)

    def _whole(self, pair: Pair) -> tuple[images.Jpeg, NDArray[np.uint8]]:
        content, coded = (persistent(Path.read_bytes, self.source / name) for name in (pair.image, pair.mask))
        image, encoding = images.examine(content, self.rules), self.layout.encoding(pair)
        with _named(self.source / pair.mask):
            mask = encoding.label(encoding.decode(coded))
            if image.orientation > 1:
                mask = _turned(mask, image, self.layout.as_stored)
        if self.layout.oversized:
            mask = mask[: image.height, : image.width]
        _same_size(pair, mask.shape, (image.height, image.width))
        return image, mask

    def _patch(self, pair: Pair, box: Box) -> tuple[images.Jpeg, NDArray[np.uint8]]:
        y0, x0, y1, x1 = box
        tile, coded = _tile(self.source / pair.image), _tile(self.source / pair.mask)
        _same_size(pair, coded.shape, tile.shape)
        patch = tile[y0:y1, x0:x1]
        if self.layout.red_green:
            red, green = (patch[..., channel] for channel in self.layout.red_green[self.target.spec.split])
            patch = np.stack([red, green, ((red.astype(np.uint16) + green) // 2).astype(np.uint8)], axis=-1)
        with _named(self.source / pair.mask):
            mask = self.layout.encoding(pair).label(coded[y0:y1, x0:x1])
        return images.examine(png(patch), self.rules), mask


@lru_cache(maxsize=2)  # an image and its mask, 108 MB each: patches of one tile are consecutive
def _tile(file: Path) -> NDArray[np.uint8]:
    """Read an image or mask as u8 (height, width, 3)."""
    content = persistent(Path.read_bytes, file)
    with _named(file), Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def _turned(mask: NDArray[np.uint8], image: images.Jpeg, as_stored: bool) -> NDArray[np.uint8]:
    """Rotate the mask of an image that was rotated by its EXIF orientation, if the mask matches the unrotated image."""
    quarter = image.orientation >= 5
    if mask.shape != ((image.width, image.height) if quarter else (image.height, image.width)):
        return mask  # drawn on the rotated image; if it fits neither, `_same_size` raises
    if not as_stored and (not quarter or image.height == image.width):
        raise ValueError(
            f"may have been drawn before or after its image is turned (EXIF orientation {image.orientation}), "
            "and their size does not say which: rotate the image's pixels, or remove that tag"
        )
    picture = Image.fromarray(mask)
    picture.getexif()[_ORIENTATION] = image.orientation
    return np.asarray(ImageOps.exif_transpose(picture))


def _same_size(pair: Pair, mask: tuple[int, ...], image: tuple[int, ...]) -> None:
    if mask[:2] != image[:2]:
        raise SourceError(
            f"{pair.mask} has {mask[1]} x {mask[0]} pixels, its image {pair.image} {image[1]} x {image[0]}"
        )


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Turn errors about a mask into SourceError that names its file."""
    try:
        yield
    except (SourceError, MemoryError):
        raise
    except ValueError as error:
        raise SourceError(f"{file} {error}") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... on damaged data, scipy others
        raise SourceError(f"{file} cannot be read: {error}") from None
