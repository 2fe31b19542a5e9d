"""Shared code of the methods that train on top of a trained backbone: settings, a loss, and heads on a frozen backbone.

Letters: B images, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import recipes
from trainer import method
from trainer.segmentation.labelled import VOID


@dataclass(frozen=True)
class Pretrained:
    """The backbone that a method starts from, and the normalisation of its input."""

    backbone: str = "vit_base_patch16"
    """vit_SIZE_patchP, convnext_SIZE, resnet50 or timm:NAME"""
    cls_token: bool = False
    """whether the ViT has a CLS token; it takes part in attention, but is not classified"""
    mean: tuple[float, float, float] = recipes.IMAGENET_MEAN
    """mean of the pixels that the backbone was trained with, in the unit range"""
    std: tuple[float, float, float] = recipes.IMAGENET_STD
    """standard deviation of these pixels"""


def check_segmentation(classes: int, stride: int | None, window: int) -> None:
    """Raise ValueError for more classes than a label map can hold, and for a stride that leaves gaps."""
    if not 1 <= classes <= VOID:
        raise ValueError(f"classes is {classes}: label maps hold 1 to {VOID}")
    if stride is not None and not 1 <= stride <= window:
        raise ValueError(f"stride is {stride}: windows of {window} would leave gaps")


def pixel_loss(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy and the accuracy over labelled pixels, in float32.

    Logits (B, C, rows, columns) of any grid are interpolated to the size of the label maps, i64 (B, H, W).
    """
    with torch.autocast(logits.device.type, enabled=False):
        whole = F.interpolate(method.fp32(logits), truth.shape[1:], mode="bilinear")
        count = (truth != VOID).sum().clamp(min=1)
        loss = F.cross_entropy(whole, truth, ignore_index=VOID, reduction="sum") / count
        return loss, ((whole.argmax(1) == truth).sum() / count).detach()


class Frozen(method.Method):
    """A frozen backbone in evaluation mode, with several independent `heads`.

    `scales` are factors of the run's learning rate, one per head. `decays` are the heads' weight decays; None stands
    for the run's.
    """

    def __init__(
        self,
        cfg: Any,
        *,
        encoder: nn.Module,
        heads: Sequence[nn.Module],
        scales: Sequence[float],
        decays: Sequence[float | None],
    ) -> None:
        super().__init__()
        self.cfg, self.mean, self.std = cfg, cfg.mean, cfg.std
        self.encoder: Any = encoder.requires_grad_(False).eval()
        self.heads = nn.ModuleList(heads)
        self._scales, self._decays = scales, decays

    def backbone(self) -> nn.Module:
        return self.encoder

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.encoder.eval()
        return self

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return a group per head. All its parameters decay, as in mmsegmentation and in DINOv3's evaluation."""
        return [
            {
                "params": list(head.parameters()),
                "weight_decay": weight_decay if decay is None else decay,
                "lr_scale": scale,
            }
            for head, scale, decay in zip(self.heads, self._scales, self._decays, strict=True)
        ]


def normal_(layer: nn.Linear | nn.Conv2d) -> None:
    """Initialise weights as normal with standard deviation 0.01, and the bias with 0."""
    with torch.no_grad():
        nn.init.normal_(layer.weight, std=0.01)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
