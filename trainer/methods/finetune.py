"""Semantic segmentation end to end: a backbone and one linear layer on its patches, "linear decoder" in Segmenter.

Strudel, Garcia, Laptev, Schmid, "Segmenter: Transformer for Semantic Segmentation" (arXiv 2105.05633), as LOCA is
judged by it (arXiv 2212.02400, section 4.1). `python -m trainer.finetune` starts it from trained weights and scores it.

Letters: B images, C classes, D width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import Batch, Recipe, recipes
from trainer import method
from trainer.backbones import feature_map, named, normalise, vit_shape
from trainer.segmentation.labelled import VOID


@dataclass(frozen=True)
class Config:
    """The defaults are LOCA's fine-tuning on ADE20k; what it leaves open is Segmenter's."""

    backbone: str = "vit_base_patch16"
    """vit_SIZE_patchP, convnext_SIZE, resnet50 or timm:NAME"""
    cls_token: bool = False
    """whether the ViT has one; it takes part in attention, and is not classified"""
    classes: int = 150
    drop_path: float = 0.1
    """of the last block, falling linearly to 0 at the first"""
    mean: tuple[float, float, float] = recipes.IMAGENET_MEAN
    std: tuple[float, float, float] = recipes.IMAGENET_STD
    """of the pixels that the backbone was trained with, in the unit range"""
    stride: int | None = None
    """pixels from one window to the next, where images are scored; null: a window's, which is a crop's of training"""
    views: recipes.Segmentation = field(default_factory=recipes.Segmentation)

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that mean nothing."""
        if not 1 <= self.classes <= VOID:
            raise ValueError(f"classes is {self.classes}: label maps hold 1 to {VOID}")
        if self.stride is not None and not 1 <= self.stride <= self.views.size:
            raise ValueError(f"stride is {self.stride}: windows of {self.views.size} would leave gaps")
        if self.backbone.startswith("vit") and self.views.size % (patch := vit_shape(self.backbone).patch):
            raise ValueError(f"views.size is {self.views.size}: {self.backbone} needs a multiple of {patch}")
        views(self)


def views(cfg: Config) -> Recipe:
    """What the method wants cut."""
    return cfg.views.recipe()


class Method(method.Method):
    """Logits are interpolated to the crop's size; the loss is the mean cross-entropy of its labelled pixels."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg, self.mean, self.std = cfg, cfg.mean, cfg.std
        encoder: Any = named(cfg.backbone, size=cfg.views.size, drop_path=cfg.drop_path, cls_token=cfg.cls_token)
        self.encoder = encoder.train()
        self.head = nn.Linear(encoder.num_features, cfg.classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.window, self.stride = cfg.views.size, cfg.stride

    def backbone(self) -> nn.Module:
        return self.encoder

    def forward(self, batch: Batch, progress: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        view = batch.views["image"]
        assert view.mask is not None  # the recipe asks for it
        truth = view.mask.flatten(0, 1).long()
        logits = self.logits(normalise(view.pixels, self.mean, self.std))
        with torch.autocast(progress.device.type, enabled=False):
            whole = F.interpolate(method.fp32(logits), truth.shape[1:], mode="bilinear")
            count = (truth != VOID).sum().clamp(min=1)
            loss = F.cross_entropy(whole, truth, ignore_index=VOID, reduction="sum") / count
            right = (whole.argmax(1) == truth).sum() / count
        return loss, {"pixel_accuracy": right.detach()}

    def logits(self, pixels: Tensor) -> Tensor:
        """f32 (B, 3, H, W), normalised -> (B, C, rows, columns) of the patch grid."""
        features = feature_map(self.encoder, pixels)
        return self.head(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
