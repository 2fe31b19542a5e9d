"""Scores of a trained segmentation method on whole images, by overlapping windows, at the size of the label maps."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trainer import parallel
from trainer.backbones import normalise, stride
from trainer.console import counting
from trainer.segmentation.labelled import VOID, Labelled, fitted
from trainer.segmentation.metric import Confusion, average_precision, label_map, localised, percent

WINDOWS = 8  # per forward pass


class Figures:
    """All figures of the predictions on a set, from one pass over the images, which the ranks share.

    With `multilabel`, predictions only say which classes are in an image: average precision is the only figure.
    """

    def __init__(self, count: int, classes: int, device: torch.device, *, multilabel: bool = False) -> None:
        self.segmentation, self.localisation = Confusion(classes, device), Confusion(classes, device)
        self.scores = torch.zeros(count, classes, device=device)
        self.present = torch.zeros(count, classes, dtype=torch.int64, device=device)
        self._multilabel = multilabel

    def add(self, i: int, scores: Tensor, truth: Tensor) -> None:
        """Count image `i`, with logits (C, h, w) of any size and the label map (H, W).

        For a segmentation, the score of a class in the image is its largest probability in any pixel.
        """
        self.present[i] = truth[truth != VOID].long().bincount(minlength=len(scores)) > 0
        if self._multilabel:
            self.scores[i] = scores.mean((1, 2))
            return
        self.scores[i] = scores.softmax(0).amax((1, 2))
        image = Confusion(len(scores), scores.device)
        image.add(label_map(scores, *truth.shape), truth)
        self.segmentation.matrix += image.matrix
        self.localisation.matrix += localised(image.matrix)

    def gather_(self) -> None:
        """Sum the counts of all ranks, in place."""
        for part in (self.segmentation.matrix, self.localisation.matrix, self.scores, self.present):
            parallel.sum_over_ranks_(part)

    def result(self, names: list[str]) -> dict[str, Any]:
        """Return all figures in percent, the main one first; `per_class` is IoU or precision, None if undefined."""
        precision = average_precision(self.scores, self.present > 0)
        found: dict[str, Any] = {}
        if not self._multilabel:
            found["miou"] = 100 * self.segmentation.miou
            found["pixel_accuracy"] = 100 * self.segmentation.pixel_accuracy
            found["localisation_miou"] = 100 * self.localisation.miou
        found["multilabel_map"] = 100 * precision.nanmean().item()
        each = precision if self._multilabel else self.segmentation.iou
        return found | {"per_class": dict(zip(names, map(percent, each.tolist()), strict=True))}


def score(method: Any, data: Labelled, device: torch.device, *, show: str | None = None) -> list[Figures]:
    """Score each head of a method, `finetune` or `heads`, on a whole set. `show` titles a progress bar.

    Raises ValueError if no pixel of the set has a label.
    """
    method = method.to(device).eval()
    classes = method.cfg.classes
    multilabel = getattr(method.cfg, "objective", "segmentation") == "multilabel"
    found = [Figures(len(data), classes, device, multilabel=multilabel) for _ in getattr(method, "heads", [None])]
    mine = range(parallel.rank(), len(data), parallel.world_size())
    for i in counting(show, mine):
        truth = data.mask(i).to(device)
        each = logits(method, data.image(i)).unflatten(0, (-1, classes))
        for figures, scores in zip(found, each, strict=True):
            figures.add(i, scores, truth)
    for figures in found:
        figures.gather_()
    if not found[0].present.any():
        raise ValueError(f"{data.name}: no pixel has a label")
    return found


@torch.no_grad()
def logits(method: Any, picture: Image.Image) -> Tensor:
    """Return scores (K * C, h, w) of the picture, resized as in training at scale 1, of one head after another.

    Windows of ``method.window`` pixels lie ``method.stride`` apart; a picture smaller than a window is enlarged. Logits
    are interpolated to the pixels of their window and averaged over overlapping windows. If ``method.window`` is None,
    the whole picture is scored at once, with sides rounded to multiples of the backbone's stride.
    """
    views, size = method.cfg.views, method.window
    device = next(method.parameters()).device
    sides = picture.height, picture.width
    if size is None:
        height, width = fitted(*sides, views.short_side, stride(method.backbone()))
    else:
        scale = max(views.short_side, size) / min(sides)
        height, width = (max(size, int(side * scale + 0.5)) for side in sides)
    x = normalise(torch.from_numpy(np.array(picture)).to(device)[None, None], method.mean, method.std)
    x = F.interpolate(x, (height, width), mode="bilinear", antialias=views.antialias)
    step = method.stride or size
    rows, columns = ([0] if size is None else starts(side, size, step) for side in (height, width))
    shape = (height, width) if size is None else (size, size)
    windows = [(slice(y, y + shape[0]), slice(left, left + shape[1])) for y in rows for left in columns]
    total, cover = None, x.new_zeros(height, width)
    for first in range(0, len(windows), WINDOWS):
        some = windows[first : first + WINDOWS]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = method.logits(torch.cat([x[:, :, *at] for at in some]))
        if total is None:
            total = x.new_zeros(found.shape[1], height, width)
        for at, part in zip(some, found.float(), strict=True):
            total[:, *at] += F.interpolate(part[None], shape, mode="bilinear")[0]
            cover[at] += 1
    assert total is not None  # there is at least one window
    return total / cover


def starts(length: int, size: int, stride: int) -> list[int]:
    """Return the starts of windows of `size`, `stride` apart, that cover `length`. The last one ends at `length`."""
    return [*range(0, length - size, stride), length - size]
