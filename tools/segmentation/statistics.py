"""The number of pixels of each class: counted when shards are made, and again when they are checked."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sharding.check import Found

from .classes import VOID


def sums(mask: NDArray[np.uint8]) -> dict[str, int]:
    """Count what a mask adds to its split: for each class present, and for void, its pixels and one image."""
    pixels = np.bincount(mask.ravel(), minlength=256)
    present = np.flatnonzero(pixels).tolist()
    return {f"pixels {label}": int(pixels[label]) for label in present} | {f"images {label}": 1 for label in present}


def statistics(classes: list[str], added: Mapping[str, int]) -> dict[str, Any]:
    """Return the manifest's fields `classes` and `void`: pixels, their share in percent, and the images that have any.

    The share of a class is that of the labelled pixels, the share of void that of all pixels.
    """
    pixels = {label: added.get(f"pixels {label}", 0) for label in (*range(len(classes)), VOID)}
    whole = max(1, sum(pixels.values()))
    labelled = max(1, whole - pixels[VOID])

    def row(label: int, of: int) -> dict[str, float]:
        share = round(100 * pixels[label] / of, 4)
        return {"pixels": pixels[label], "share": share, "images": added.get(f"images {label}", 0)}

    return {"classes": {name: row(k, labelled) for k, name in enumerate(classes)}, "void": row(VOID, whole)}


def look(key: str, read: Callable[[str], bytes], classes: list[str]) -> Found:
    """Examine a finished sample: the mask must have the image's size and only classes or void; the label must be -1."""
    try:
        width, height = Image.open(io.BytesIO(read("jpg"))).size
        mask = Image.open(io.BytesIO(read("seg.png")))
        numbers, metadata = np.asarray(mask), json.loads(read("json"))
        said = [metadata["width"], metadata["height"], metadata["label"], int(read("cls"))]
        added = sums(numbers)
    except Exception as error:  # Pillow and json raise many kinds on damaged data
        return Found(0, 0, -1, (f"{key} cannot be read: {error}",))
    differences = []
    if (mask.format, mask.mode, mask.size) != ("PNG", "L", (width, height)):
        form = f"a {mask.format} of mode {mask.mode}, {mask.width} x {mask.height}"
        differences.append(f"{key}.seg.png is {form}: not one channel of {width} x {height} pixels as its image")
    if beyond := sorted(set(np.unique(numbers).tolist()) - {*range(len(classes)), VOID}):
        differences.append(f"{key}.seg.png holds {beyond[0]}: there are {len(classes)} classes")
    if said != [width, height, -1, -1]:
        differences.append(f"{key}: its json and cls say width, height, label, class = {said}")
    return Found(height, width, -1, tuple(differences), added)


def compare(folder: Path, manifest: dict[str, Any], added: Mapping[str, int]) -> list[str]:
    """Return the differences between the manifest's statistics and those of a split's masks, one sentence each."""
    file = folder / manifest["class_file"]
    names = file.read_text("utf-8").splitlines() if file.is_file() else []
    counted, rows = statistics(names, added), manifest.get("classes")
    if not isinstance(rows, dict) or list(rows) != names:
        return [f"{file.name}: its classes are not those of the manifest of split {manifest['split']!r}"]
    pairs = [(name, rows[name], row) for name, row in counted["classes"].items()]
    return [
        f"{name}: the masks of split {manifest['split']!r} have {row}, the manifest says {said}"
        for name, said, row in [*pairs, ("void", manifest.get("void"), counted["void"])]
        if said != row
    ]
