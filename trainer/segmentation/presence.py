"""Multi-label classification: which classes are in an image, by a linear layer on its frozen mean patch feature.

As in LOCA's tables 3 and 7, targets are the classes in the label map, the loss is binary cross-entropy, and the figure
is mAP. The paper does not say how patches are pooled; without a CLS token, the mean is the natural choice. Here the
layer minimises a convex function with an L2 penalty on the weights, so that there is no learning rate to tune.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.segmentation.features import Features
from trainer.segmentation.metric import average_precision
from trainer.segmentation.probes import PENALTIES


class Images(NamedTuple):
    x: Tensor  # f64 (n, D): the mean feature of each image
    present: Tensor  # bool (n, C): whether any pixel has the class


def pooled(features: Features) -> Images:
    """Return each image's mean feature and the classes present in it."""
    rows = [features.rows(j) for j in range(len(features.images))]
    x = torch.stack([features.x[some].float().mean(0) for some in rows])
    return Images(x.double(), torch.stack([(features.shares[some] > 0).any(0) for some in rows]))


def fit(train: Images, penalty: float, start: Tensor | None = None) -> Tensor:
    """Minimise the mean cross-entropy plus ``penalty / 2 * |weights|^2``. Return f64 (D + 1, C), the bias last."""
    x = F.pad(train.x, (0, 1), value=1)
    weight = torch.zeros(x.shape[1], train.present.shape[1], dtype=torch.float64) if start is None else start.clone()
    weight.requires_grad_()
    truth = train.present.double()

    def closure() -> Tensor:
        weight.grad = None
        loss = F.binary_cross_entropy_with_logits(x @ weight, truth) + penalty / 2 * weight[:-1].square().sum()
        loss.backward()
        return loss

    options = {"max_iter": 500, "tolerance_grad": 1e-7, "tolerance_change": 1e-10, "line_search_fn": "strong_wolfe"}
    torch.optim.LBFGS([weight], **options).step(closure)  # type: ignore[arg-type]
    return weight.detach()


def multilabel(train: Features, val: Features, seed: int = 0) -> dict[str, float]:
    """Return the mAP on `val` in percent, and the penalty, which is chosen on a held-out tenth of `train`.

    Features are standardised with the statistics of `train`. Raises ValueError for a single training image.
    """
    seen, unseen = pooled(train), pooled(val)
    mean, std = seen.x.mean(0), seen.x.std(0, correction=0) + 1e-5
    seen, unseen = (part._replace(x=(part.x - mean) / std) for part in (seen, unseen))
    order = np.random.default_rng(seed).permutation(len(seen.x))
    held, rest = np.split(order, [max(1, len(order) // 10)])
    if not len(rest):
        raise ValueError("one training image is too few: the penalty is chosen on images that are held out")
    some, others = Images(*(part[held] for part in seen)), Images(*(part[rest] for part in seen))
    best, penalty, weight = -1.0, PENALTIES[0], None
    for candidate in PENALTIES:
        weight = fit(others, candidate, weight)
        found = precision(weight, some)
        if found > best:
            best, penalty = found, candidate
    return {"map": 100 * precision(fit(seen, penalty), unseen), "penalty": penalty}


def precision(weight: Tensor, images: Images) -> float:
    """Return the mAP of a linear layer; 0 if no image has a class."""
    found = average_precision(images.x @ weight[:-1] + weight[-1], images.present).nanmean().item()
    return 0.0 if np.isnan(found) else found
