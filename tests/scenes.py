"""Pictures with label maps that a network can learn from, as shards."""

from pathlib import Path

import numpy as np
from mapimages import encode, write_tar
from numpy.typing import NDArray

from pipeline import recipes
from trainer.methods import finetune
from trainer.segmentation.labelled import VOID

NAMES = ["left", "right", "disc"]


def pair(seed: int, height: int = 48, width: int = 64) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A picture and its label map: two halves and a disc, each of a colour of its own, and a void frame."""
    g = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    mask = (x > width * g.uniform(0.3, 0.7)).astype(np.uint8)
    mask[(y - height * g.uniform(0.3, 0.7)) ** 2 + (x - width * g.uniform(0.3, 0.7)) ** 2 < 120] = 2
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])[mask] + g.normal(0, 25, (height, width, 3))
    mask[:2] = VOID
    return colours.clip(0, 255).astype(np.uint8), mask


def write_pairs(
    folder: Path, pairs: list[tuple[NDArray | bytes, NDArray | None]], names: list[str] | None = NAMES
) -> str:
    """A folder with one tar of pictures, or bytes in their place, and label maps, and the list of classes."""
    folder.mkdir()
    members = []
    for i, (picture, mask) in enumerate(pairs):
        content = picture if isinstance(picture, bytes) else encode(picture, "JPEG", quality=95)
        members.append((f"street/{i:03d}.jpg", content))
        if mask is not None:
            members.append((f"street/{i:03d}.seg.png", encode(mask)))
    write_tar(folder / "pairs-000000.tar", members)
    if names:
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    return str(folder)


def small_network(**views: object) -> finetune.Config:
    """A fine-tuning of three classes on windows of 32 pixels, cheap enough to be built in each test."""
    crop = recipes.Segmentation(**{"size": 32, "short_side": 32, **views})  # type: ignore[arg-type]
    return finetune.Config("vit_pico_patch8", classes=3, views=crop, stride=16)
