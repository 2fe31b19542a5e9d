"""LOCA's ablations: locate or cluster something other than the patches of query views.

The argument `loca` is the method of trainer/methods/loca.py. Letters are as in that file; V is the number of queries.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline import Recipe
from trainer.method import fp32


def views(cfg: Any, recipe: Recipe) -> Recipe:
    """Adapt LOCA's recipe: `position` "single" keeps the reference only, "box" adds the queries' boxes as a target."""
    if cfg.position == "single":
        return replace(recipe, cuts=tuple(cut for cut in recipe.cuts if cut.kind == "reference"), targets=None)
    if cfg.position == "box" and (patches := recipe.targets) is not None:
        kinds = [cut.kind for cut in recipe.cuts if cut.kind != "reference"]

        def with_boxes(windows: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[Any]]:
            queries = np.concatenate([windows[kind] for kind in kinds], axis=1)
            return {**patches(windows), "box": relative_boxes(windows["reference"], queries)}

        return replace(recipe, targets=with_boxes)
    return recipe


# ---- What is located -------------------------------------------------------------------------------------------------


def centre(grid: int) -> int:
    """Return the index of the central patch: the view's centre is its centre (odd grid) or upper left corner (even)."""
    return (grid // 2) * grid + grid // 2


def centre_loss(
    loca: Any, tokens: Tensor, seen: Tensor | None, target: Tensor, lengths: list[int]
) -> tuple[Tensor, Tensor]:
    """Return position loss and accuracy of all central patches (Table 5). `draw` puts the random query's first."""
    starts = [sum(lengths[:v]) for v in range(len(lengths))]
    at = [0] + [start + centre(round(n**0.5)) for start, n in zip(starts[1:], lengths[1:], strict=True)]
    return loca.position_loss(tokens[:, at], seen, target[:, at], [1] * len(at))


def box_loss(
    loca: Any, tokens: Tensor, seen: Tensor | None, boxes: Tensor, lengths: list[int]
) -> tuple[Tensor, Tensor]:
    """Return the loss of regressing each query's box (B, V, 4) from its mean token (Table 5), and the mean IoU."""
    x = loca.student.norm(loca.student.cross(tokens, seen))
    x = torch.stack([view.mean(1) for view in x.split(lengths, dim=1)], dim=1)
    predicted = fp32(loca.student.head(x)).sigmoid()
    valid = boxes[..., 2] > 0
    loss, iou = box_distance(predicted, torch.where(valid[..., None], boxes, predicted.detach()))
    each = [1] * len(lengths)
    return loca.average(loss, valid, each), loca.average(iou, valid, each)


def single_view(loca: Any, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Predict each patch's own position in a single view, without position embeddings. Return the loss and metrics.

    Only visible patches serve as keys and values. After Zhai et al., "Position Prediction as an Effective Pretraining
    Strategy"; section 5.1 of the LOCA paper.
    """
    vit = loca.student.backbone
    _, visible = loca.draw(len(images), images.device)
    context = torch.zeros(len(visible), vit.grid**2, dtype=torch.bool, device=images.device)
    logits = fp32(loca.student.head(vit(images, context=context.scatter(1, visible, True))))
    target = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
    loss = F.cross_entropy(logits.mT, target)
    return loss, {"position_loss": loss.detach(), "position_accuracy": (logits.argmax(-1) == target).float().mean()}


# ---- What is clustered -----------------------------------------------------------------------------------------------


def image_cluster_loss(loca: Any, queries: list[Tensor], reference: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the cluster loss of whole views, tokens (B, n, D) each, by their CLS or mean token (Table 6b)."""

    def summary(tokens: Tensor) -> Tensor:
        return tokens[:, :1] if loca.cfg.clusters == "cls" else tokens.mean(dim=1, keepdim=True)

    summaries = torch.cat([summary(view) for view in queries], dim=1)
    rows = torch.zeros(summaries.shape[:2], dtype=torch.long, device=summaries.device)  # row 0, the only one
    return loca.cluster_loss(summaries, summary(reference), rows, [1] * len(queries))


# ---- Boxes: (cy, cx, h, w), relative to the sides of the reference ---------------------------------------------------


def relative_boxes(reference: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the queries' boxes in the reference view: windows (B, 1, 4) and (B, V, 4) -> f32 (B, V, 4).

    A flipped reference flips the boxes. Boxes are clipped to the reference. A box is -1 if a tenth of the reference's
    height or width or less remains (released LOCA code).
    """
    y0, x0, y1, x1 = np.moveaxis(reference[..., None], 2, 0)  # each (B, 1, 1)
    rows = np.sort((queries[..., 0::2] - y0) / (y1 - y0), axis=-1).clip(0, 1)
    columns = np.sort((queries[..., 1::2] - x0) / (x1 - x0), axis=-1).clip(0, 1)
    edges = np.stack([rows, columns], axis=-2)  # (B, V, axis, ends)
    sides = edges[..., 1] - edges[..., 0]
    box = np.concatenate([edges.mean(-1), sides], axis=-1)
    return np.where((sides > 0.1).all(-1, keepdims=True), box, -1).astype(np.float32)


def box_distance(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return 5 L1 + 2 (1 - generalised IoU) and the IoU of each pair of boxes: (..., 4) twice -> (...) twice.

    The weights are those of DETR and UP-DETR. Sides must be positive.
    """
    (a_low, a_high), (b_low, b_high) = (
        (box[..., :2] - box[..., 2:] / 2, box[..., :2] + box[..., 2:] / 2) for box in (predicted, target)
    )
    overlap = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(-1)
    union = predicted[..., 2:].prod(-1) + target[..., 2:].prod(-1) - overlap
    hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(-1)
    iou = overlap / union
    generalised = iou - (hull - union) / hull
    return 5 * (predicted - target).abs().sum(-1) + 2 * (1 - generalised), iou
