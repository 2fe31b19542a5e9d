"""Images whose colour is their coordinate, packed as real WebDataset shards.

The pixel (row, column) of image k is (red, green, blue) = (column, row, k). Each pixel of a view therefore shows where
it comes from, after decoding, cutting, resizing and flipping, independent of the loader's own numbers.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.recipes import Augmentation, Cut, Recipe

SIZES = ((160, 240), (250, 170), (200, 200), (96, 256))  # (height, width), at most 256: a byte each
STILL = (Augmentation(),)  # no colour operation


def map_image(number: int, height: int, width: int) -> NDArray[np.uint8]:
    """u8 (height, width, 3) as above."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.full_like(rows, number % 256)], axis=-1).astype(np.uint8)


def encode(image: NDArray[np.uint8] | Image.Image, form: str = "PNG", **options: object) -> bytes:
    """The bytes of an image file."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def image(number: int, height: int = 20, width: int = 30, form: str = "JPEG") -> bytes:
    """A small map image as a file."""
    return encode(map_image(number, height, width), form)


def smooth_image(number: int, height: int, width: int) -> NDArray[np.uint8]:
    """A photograph's stand-in: smooth, different for each number, colourful."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(2 * np.pi * (f * x + g * y) + number * h) for f, g, h in ((2, 1, 1), (1, 3, 2), (3, -2, 3))]
    return np.uint8(127.5 + 100 * np.stack(waves, axis=-1))


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of these members, in order."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key: str, image: bytes, label: int | None = None, extension: str = "jpg") -> list[tuple[str, bytes]]:
    """The members of one sample: image, class, metadata."""
    members = [(f"{key}.{extension}", image)]
    if label is not None:
        members += [(f"{key}.cls", str(label).encode()), (f"{key}.json", json.dumps({"label": label}).encode())]
    return members


def write_set(
    folder: Path,
    count: int = 24,
    shards: int = 3,
    changed: Mapping[int, bytes] | None = None,
    make: object = map_image,
    form: str = "PNG",
) -> Path:
    """A folder of `shards` tars with `count` images in all, label k % 7; `changed` replaces the bytes of some."""
    folder.mkdir(parents=True, exist_ok=True)
    changed = changed or {}
    per_shard = -(-count // shards)
    for shard in range(shards):
        members = []
        for k in range(shard * per_shard, min(count, (shard + 1) * per_shard)):
            content = changed.get(k)
            if content is None:
                options = {"quality": 90} if form == "JPEG" else {}
                content = encode(make(k, *SIZES[k % len(SIZES)]), form, **options)  # type: ignore[operator]
            members += sample(f"image-{k:05d}", content, k % 7, "jpg" if form == "JPEG" else "png")
        write_tar(folder / f"map-{shard:04d}.tar", members)
    return folder


def still_recipe(
    antialias: bool = False, interpolation: str = "bilinear", flip: float = 0.5, size: int = 64, queries: int = 3
) -> Recipe:
    """LOCA's kinds, small, without colours: pixels stay coordinates."""
    options = {"flip": flip, "antialias": antialias, "interpolation": interpolation, "augmentations": STILL}
    return Recipe(
        "still",
        "paper",
        (
            Cut("reference", 1, size, size // 16, (0.32, 1.0), **options),  # type: ignore[arg-type]
            Cut("query", 1, size, size // 16, (0.32, 1.0), **options),  # type: ignore[arg-type]
            Cut("focal", queries, size // 2, size // 32, (0.05, 0.32), **options),  # type: ignore[arg-type]
        ),
    )


def coordinates(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(..., 3) -> (..., 2): the (y, x) in the stored image, at pixel edges, that each pixel of a view shows."""
    return pixels[..., [1, 0]].astype(np.float64) + 0.5


def expected(window: NDArray[np.float32], size: int) -> NDArray[np.float64]:
    """(size, size, 2): the (y, x) that each pixel of a view of `window` should show, by the window's definition."""
    y0, x0, y1, x1 = (float(v) for v in window)
    steps = (np.arange(size) + 0.5) / size
    y = np.clip(y0 + steps * (y1 - y0), y0 + 0.5, y1 - 0.5)  # the outermost half pixel repeats: nothing lies beyond
    x = np.clip(x0 + steps * (x1 - x0), min(x0, x1) + 0.5, max(x0, x1) - 0.5)
    return np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1)
