"""Shards of images with label maps: ``KEY.jpg`` beside ``KEY.seg.png``, a single-channel PNG of class indices."""

import io
from pathlib import Path
from typing import NoReturn

import torch
from PIL import Image
from torch import Tensor

from pipeline import ShardSet, decode_mask

VOID = 255  # pixels without a label: they count nowhere, and predictions there neither
LARGEST = 512  # pixels of a short side, unless more are asked for: that of most published figures


class Labelled:
    """The images of `spec`, numbered, and their label maps."""

    def __init__(self, spec: str) -> None:
        self.shards = ShardSet(spec)
        self.name = spec
        self.classes = _listed(Path(str(self.shards.paths[0])).with_name("classes.txt"))

    def __len__(self) -> int:
        return len(self.shards)

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of image `i` by its header. Raises ValueError that names it where that is none."""
        height, width = (int(self.shards.table[side][i]) for side in ("height", "width"))
        return (height, width) if height and width else self._refuse(i, "cannot be read")

    def image(self, i: int) -> Image.Image:
        """Image `i` in RGB. Raises ValueError that names it where it cannot be decoded."""
        try:
            return Image.open(io.BytesIO(self.shards.read(i))).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            return self._refuse(i, f"cannot be read ({error})")

    def mask(self, i: int) -> Tensor:
        """The label map of image `i`, u8 (H, W): classes, VOID for none. Raises ValueError that names a bad one."""
        if (stored := self.shards.read_mask(i)) is None:
            self._refuse(i, "has no mask, KEY.seg.png beside it: tools/shard_segmentation.py makes such shards")
        try:
            labels = decode_mask(stored)
        except ValueError as error:
            self._refuse(i, f"cannot be used: {error}")
        if labels.shape != self.size(i):
            self._refuse(i, f"is of size {self.size(i)}, its mask {labels.shape}")
        if self.classes and (labelled := labels[labels != VOID]).size and labelled.max() >= len(self.classes):
            self._refuse(i, f"has a mask with class {labelled.max()}, but classes.txt lists {len(self.classes)}")
        return torch.from_numpy(labels)

    def _refuse(self, i: int, reason: str) -> NoReturn:
        raise ValueError(f"{self.shards.shard_of(i)}: image {self.shards.key(i)} {reason}") from None


def class_names(*sets: Labelled) -> list[str]:
    """The classes of all sets: as listed beside their shards, or numbers up to the largest label in them.

    Raises ValueError for sets whose lists differ.
    """
    lists = {tuple(labelled.classes) for labelled in sets}
    if len(lists) > 1:
        raise ValueError(f"{' and '.join(labelled.name for labelled in sets)} list different classes")
    if names := lists.pop():
        return list(names)
    largest = -1
    for labelled in sets:
        for i in range(len(labelled)):
            mask = labelled.mask(i)
            largest = max(largest, int(mask.where(mask != VOID, 0).max()))
    return [str(label) for label in range(largest + 1)]


def fitted(height: int, width: int, short_side: int | None, stride: int) -> tuple[int, int]:
    """The sides of an image at `short_side`, its ratio kept, each at the nearest multiple of `stride`.

    None stands for the image's own short side, at most LARGEST. Images are resized, not padded: a patch shows nothing
    that is not there.
    """
    scale = (min(height, width, LARGEST) if short_side is None else short_side) / min(height, width)
    return tuple(max(1, int(side * scale / stride + 0.5)) * stride for side in (height, width))  # type: ignore[return-value]


def class_shares(mask: Tensor, rows: int, columns: int, classes: int) -> Tensor:
    """How a label map (H, W) fills a patch grid: f32 (rows * columns, C), each class's share of a patch's pixels.

    A pixel belongs to the patch under its centre. Void pixels take part in no class: a row sums to what is labelled.
    """
    row = ((torch.arange(mask.shape[0]) + 0.5) * (rows / mask.shape[0])).long()
    column = ((torch.arange(mask.shape[1]) + 0.5) * (columns / mask.shape[1])).long()
    patch = row[:, None] * columns + column
    pixels = torch.bincount(patch.flatten(), minlength=rows * columns)
    labelled = mask != VOID
    counts = torch.bincount(patch[labelled] * classes + mask[labelled], minlength=rows * columns * classes)
    return counts.view(-1, classes) / pixels.clamp(min=1)[:, None].float()


def _listed(path: Path) -> list[str]:
    """The class list beside the shards, a name a line. Empty where there is none, as beside a remote set."""
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
