"""Boxes (cy, cx, h, w) of queries in a reference, relative to its sides, and the loss that DETR regresses them with."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def relative_boxes(reference: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """Where queries lie in the reference as it is shown: windows (B, 1, 4) and (B, V, 4) -> f32 (B, V, 4).

    What reaches beyond the reference is cut off; -1 where less than a tenth of a side is left (released LOCA code).
    """
    y0, x0, y1, x1 = np.moveaxis(reference[..., None], 2, 0)  # each (B, 1, 1)
    rows = np.sort((queries[..., 0::2] - y0) / (y1 - y0), axis=-1).clip(0, 1)
    columns = np.sort((queries[..., 1::2] - x0) / (x1 - x0), axis=-1).clip(0, 1)
    edges = np.stack([rows, columns], axis=-2)  # (B, V, axis, ends)
    sides = edges[..., 1] - edges[..., 0]
    box = np.concatenate([edges.mean(-1), sides], axis=-1)
    return np.where((sides > 0.1).all(-1, keepdims=True), box, -1).astype(np.float32)


def box_loss(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """5 L1 + 2 (1 - generalised IoU), the weights of DETR and UP-DETR, and the IoU, of each pair of boxes.

    (..., 4) twice -> (...) twice. Sides must be positive.
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
