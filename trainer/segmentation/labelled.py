"""Shards of images with label maps: ``KEY.jpg`` beside ``KEY.seg.png``, a single-channel PNG of class indices."""

import io
from typing import NoReturn

import torch
from PIL import Image
from torch import Tensor

from pipeline import ShardSet, decode_mask

VOID = 255  # label of unlabelled pixels, which are ignored
LARGEST = 512  # default limit of the short side in pixels, as in most published results


class Labelled:
    """The images of the shards `spec`, by index, and their label maps."""

    def __init__(self, spec: str) -> None:
        self.shards = ShardSet(spec)
        self.name = spec
        self.classes = self.shards.listed("classes.txt")

    def __len__(self) -> int:
        return len(self.shards)

    def size(self, i: int) -> tuple[int, int]:
        """Return height and width of image `i` from its header. Raises ValueError that names an unreadable image."""
        height, width = (int(self.shards.table[side][i]) for side in ("height", "width"))
        return (height, width) if height and width else self._refuse(i, "cannot be read")

    def image(self, i: int) -> Image.Image:
        """Decode image `i` as RGB. Raises ValueError that names an image that cannot be decoded."""
        try:
            return Image.open(io.BytesIO(self.shards.read(i))).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            return self._refuse(i, f"cannot be read ({error})")

    def mask(self, i: int) -> Tensor:
        """Return the label map of image `i`, u8 (H, W): classes or VOID. Raises ValueError naming an invalid one."""
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
    """Return the names of the classes: the list stored beside the shards, or numbers up to the largest label.

    Raises ValueError if the sets have different lists, or if a list names a class twice.
    """
    lists = {tuple(labelled.classes) for labelled in sets}
    if len(lists) > 1:
        both = " and ".join(labelled.name for labelled in sets)
        raise ValueError(f"{both} list different classes: beside the shards of each lies the same classes.txt, or none")
    if names := lists.pop():
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{sets[0].name}: its classes.txt names {twice[0]!r} twice; name each class once")
        return list(names)
    largest = -1
    for labelled in sets:
        for i in range(len(labelled)):
            mask = labelled.mask(i)
            largest = max(largest, int(mask.where(mask != VOID, 0).max()))
    return [str(label) for label in range(largest + 1)]


def fitted(height: int, width: int, short_side: int | None, stride: int) -> tuple[int, int]:
    """Return height and width of an image resized to `short_side`, each rounded to the nearest multiple of `stride`.

    None stands for the image's own short side, at most LARGEST. The aspect ratio is kept up to rounding. Images are
    resized rather than padded, so that every patch shows the image only.
    """
    scale = (min(height, width, LARGEST) if short_side is None else short_side) / min(height, width)
    return tuple(max(1, int(side * scale / stride + 0.5)) * stride for side in (height, width))  # type: ignore[return-value]


def class_shares(mask: Tensor, rows: int, columns: int, classes: int) -> Tensor:
    """Return the fraction of each patch's pixels that has each class in a label map (H, W): f32 (rows * columns, C).

    A pixel belongs to the patch that contains its centre. Void pixels have no class: a row sums to the labelled
    fraction.
    """
    row = ((torch.arange(mask.shape[0]) + 0.5) * (rows / mask.shape[0])).long()
    column = ((torch.arange(mask.shape[1]) + 0.5) * (columns / mask.shape[1])).long()
    patch = row[:, None] * columns + column
    pixels = torch.bincount(patch.flatten(), minlength=rows * columns)
    labelled = mask != VOID
    counts = torch.bincount(patch[labelled] * classes + mask[labelled], minlength=rows * columns * classes)
    return counts.view(-1, classes) / pixels.clamp(min=1)[:, None].float()
