"""Intersection over union at the resolution of the label maps, from one confusion matrix over all images."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainer.console import counting
from trainer.segmentation.labelled import VOID, Labelled

Scores = Callable[[int], Tensor]  # j -> scores (C, rows, columns) of the j-th image, on any grid that covers it


class Confusion:
    """Counts of (true class, predicted class): i64 `matrix` (C, C), summed over the pixels of all images.

    Matrices are additive: `parallel.sum_over_ranks_(confusion.matrix)` combines those of all ranks.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        self._images: list[Tensor] = []  # per image: pixels correct, labelled and predicted per class, i64 (3, C)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Count label maps of equal shape and any integer type; `predicted` in [0, C), `truth` in [0, C) or VOID."""
        classes = len(self.matrix)
        labelled = truth != VOID
        pairs = truth[labelled].long() * classes + predicted[labelled].long()
        matrix = pairs.bincount(minlength=classes**2).view(classes, classes)
        self.matrix += matrix
        self._images.append(torch.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)]))

    @property
    def iou(self) -> Tensor:
        """f64 (C,): TP / (TP + FP + FN) of each class; NaN for a class that is neither labelled nor predicted."""
        right = self.matrix.diagonal().double()
        return right / (self.matrix.sum(0) + self.matrix.sum(1) - right)

    @property
    def miou(self) -> float:
        """The mean IoU over classes that are labelled or predicted; NaN if there are none."""
        return self.iou.nanmean().item()

    def standard_error(self, resamples: int = 1000, seed: int = 0) -> float:
        """Return the standard error of `miou` by bootstrap over images, one per call of `add`; NaN for a single image.

        It measures the effect of another sample of as many independent images, not that of another training. It is too
        small for frames of one video, which are not independent.
        """
        if len(self._images) < 2:
            return math.nan
        images = torch.stack(self._images).double().cpu()  # (n, 3, C)
        drawn = np.random.default_rng(seed).multinomial(len(images), [1 / len(images)] * len(images), resamples)
        right, labelled, predicted = torch.einsum("rn,nkc->krc", torch.from_numpy(drawn).double(), images)
        return (right / (labelled + predicted - right)).nanmean(1).std().item()

    @property
    def pixel_accuracy(self) -> float:
        """The fraction of labelled pixels that are classified correctly."""
        return (self.matrix.diagonal().sum() / self.matrix.sum()).item()


def percent(share: float) -> float | None:
    """Return a fraction in percent, or None if it is NaN, which JSON lacks."""
    return None if math.isnan(share) else 100 * share


def localised(matrix: Tensor) -> Tensor:
    """Return one image's confusion matrix (C, C) with its predicted masks renamed by an oracle; sum these over a set.

    Each predicted mask, all pixels of a class, gets the class of the true mask with which it has the best IoU, the
    lowest one on ties. This measures localisation only (LOCA, section 4.2): permuted classes do not lower it.
    """
    union = matrix.sum(1)[:, None] + matrix.sum(0) - matrix
    best = (matrix / union.clamp(min=1)).argmax(0)  # the true class of each predicted one
    return torch.zeros_like(matrix).index_add_(1, best, matrix)


def average_precision(scores: Tensor, present: Tensor) -> Tensor:
    """Return the average precision f64 (C,) of images ranked by `scores` (n, C); `present` bool (n, C) is the truth.

    It is the sum over thresholds of precision times the gain in recall; equal scores share a threshold. It is NaN for a
    class that no image has. The mean over classes is the mAP.
    """
    found = torch.full(scores.shape[1:], math.nan, dtype=torch.float64)
    for c, (score, truth) in enumerate(zip(scores.double().T, present.T, strict=True)):
        if not truth.any():
            continue
        order = score.argsort(descending=True)
        last = torch.cat([score[order].diff() != 0, truth.new_ones(1)])  # True at the last of equal scores
        hits = truth[order].double().cumsum(0)[last]
        precision = hits / (last.nonzero()[:, 0] + 1)
        found[c] = (precision * torch.cat([hits[:1], hits.diff()])).sum() / hits[-1]
    return found


def label_map(scores: Tensor, height: int, width: int, strip: int = 1 << 24) -> Tensor:
    """Return the best class of every pixel, i64 (height, width), from scores (C, rows, columns) of a patch grid.

    Scores, not labels, are interpolated bilinearly between the centres of patches (align_corners=False). This is done
    in strips of about `strip` scores, because 150 classes of a large photograph would take gigabytes.
    """
    classes, rows, _ = scores.shape
    y = ((torch.arange(height, device=scores.device) + 0.5) * (rows / height) - 0.5).clamp(0, rows - 1)
    above = y.long()
    below, share = (above + 1).clamp(max=rows - 1), (y - above).to(scores.dtype)[:, None]
    step = max(1, strip // (classes * width))
    found = torch.empty(height, width, dtype=torch.int64, device=scores.device)
    for top in range(0, height, step):
        part = slice(top, top + step)
        lines = torch.lerp(scores[:, above[part]], scores[:, below[part]], share[part])
        whole = F.interpolate(lines[None], (lines.shape[1], width), mode="bilinear", align_corners=False)
        torch.argmax(whole[0], 0, out=found[part])
    return found


def evaluate(
    data: Labelled,
    images: NDArray[np.int64],
    predictors: Mapping[str, Scores],
    classes: int,
    *,
    device: str = "cpu",
    show: str | None = None,
) -> dict[str, Confusion]:
    """Return each predictor's confusion matrix over `images` (indices in `data`). `show` titles a progress bar."""
    found = {name: Confusion(classes, device) for name in predictors}
    for j, i in enumerate(counting(show, images)):
        truth = data.mask(int(i)).to(device)
        for name, scores in predictors.items():
            found[name].add(label_map(scores(j).to(device), *truth.shape), truth)
    return found
