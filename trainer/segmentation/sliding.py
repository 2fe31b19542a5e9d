"""A fine-tuned network on whole images: resized, seen through overlapping windows, scored at the labels' own size."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from trainer import parallel
from trainer.backbones import normalise
from trainer.methods.finetune import Method
from trainer.segmentation.labelled import VOID, Labelled
from trainer.segmentation.metric import Confusion, label_map, localised, mean_average_precision

WINDOWS = 8  # in one pass


class Figures:
    """What a set's predictions are worth; all in one pass over the images, which the ranks share."""

    def __init__(self, count: int, classes: int, device: torch.device) -> None:
        self.segmentation, self.localisation = Confusion(classes, device), Confusion(classes, device)
        self.scores = torch.zeros(count, classes, device=device)
        self.present = torch.zeros(count, classes, dtype=torch.int64, device=device)

    def add(self, i: int, scores: Tensor, truth: Tensor) -> None:
        """Counts image `i`: logits (C, h, w) of any size and its label map (H, W).

        A class is present in the image as surely as it is in the most certain pixel.
        """
        classes = len(scores)
        image = Confusion(classes, scores.device)
        image.add(label_map(scores, *truth.shape), truth)
        self.segmentation.matrix += image.matrix
        self.localisation.matrix += localised(image.matrix)
        self.scores[i] = scores.softmax(0).amax((1, 2))
        self.present[i] = truth[truth != VOID].long().bincount(minlength=classes) > 0

    def gather_(self) -> None:
        """Adds what the other ranks have counted."""
        for part in (self.segmentation.matrix, self.localisation.matrix, self.scores, self.present):
            parallel.sum_over_ranks_(part)

    def result(self, names: list[str]) -> dict[str, object]:
        """In percent: mIoU, pixel accuracy and each class's IoU (None: it does not occur), and what else there is."""
        each = [None if np.isnan(iou) else 100 * iou for iou in self.segmentation.iou.tolist()]
        return {
            "miou": 100 * self.segmentation.miou,
            "pixel_accuracy": 100 * self.segmentation.pixel_accuracy,
            "localisation_miou": 100 * self.localisation.miou,
            "multilabel_map": 100 * mean_average_precision(self.scores, self.present > 0),
            "per_class": dict(zip(names, each, strict=True)),
        }


def score(method: Method, data: Labelled, device: torch.device, *, show: str | None = None) -> Figures:
    """The figures of `method`, in evaluation mode, on a whole set; `show` titles a bar."""
    method = method.to(device).eval()
    found = Figures(len(data), method.cfg.classes, device)
    mine = range(parallel.rank(), len(data), parallel.world_size())
    for i in tqdm(mine, show, unit=" images", disable=not show):
        found.add(i, logits(method, data.image(i)), data.mask(i).to(device))
    found.gather_()
    return found


@torch.no_grad()
def logits(method: Method, picture: Image.Image) -> Tensor:
    """Scores (C, h, w) of the picture, resized as in training at scale 1 and enlarged where a window would not fit.

    Each window's logits are interpolated to its pixels, and averaged where windows overlap.
    """
    cfg = method.cfg
    size = cfg.views.size
    stride = cfg.stride or size
    device = next(method.parameters()).device
    scale = max(cfg.views.short_side, size) / min(picture.size)
    height, width = (max(size, int(side * scale + 0.5)) for side in (picture.height, picture.width))
    x = normalise(torch.from_numpy(np.array(picture)).to(device)[None, None], method.mean, method.std)
    x = F.interpolate(x, (height, width), mode="bilinear", antialias=cfg.views.antialias)
    corners = [(y, x0) for y in starts(height, size, stride) for x0 in starts(width, size, stride)]
    total = x.new_zeros(cfg.classes, height, width)
    cover = x.new_zeros(height, width)
    for first in range(0, len(corners), WINDOWS):
        some = corners[first : first + WINDOWS]
        crops = torch.cat([x[:, :, y : y + size, x0 : x0 + size] for y, x0 in some])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = method.logits(crops)
        for (y, x0), part in zip(some, found.float(), strict=True):
            at = slice(y, y + size), slice(x0, x0 + size)
            total[:, *at] += F.interpolate(part[None], (size, size), mode="bilinear")[0]
            cover[at] += 1
    return total / cover


def starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows of `size` begin that cover `length`, `stride` apart; the last one is flush with the end."""
    return [*range(0, length - size, stride), length - size]
