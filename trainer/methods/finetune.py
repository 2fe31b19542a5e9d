"""Semantic segmentation end to end: a backbone and one linear layer on its patches, "linear decoder" in Segmenter.

Strudel, Garcia, Laptev, Schmid, "Segmenter: Transformer for Semantic Segmentation" (arXiv 2105.05633), as LOCA is
judged by it (arXiv 2212.02400, section 4.1). `python -m trainer.finetune` starts it from trained weights and scores it.

Letters: B images, C classes, D width.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import Batch, Recipe, recipes
from trainer import method
from trainer.backbones import feature_map, named, normalise, vit_shape
from trainer.methods._downstream import Pretrained, check_segmentation, pixel_loss
from trainer.segmentation.labelled import VOID


@dataclass(frozen=True)
class Config(Pretrained):
    """The defaults are LOCA's fine-tuning on ADE20k; what it leaves open is Segmenter's."""

    classes: int = 150
    objective: Literal["segmentation", "multilabel"] = "segmentation"
    """the class of each pixel; or which classes are in the crop, from the mean patch (LOCA's Table 9)"""
    drop_path: float = 0.1
    """of the last block, falling linearly to 0 at the first"""
    stride: int | None = None
    """pixels from one window to the next, where images are scored; null: a window's, which is a crop's of training"""
    views: recipes.Segmentation = field(default_factory=recipes.Segmentation)

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that mean nothing."""
        check_segmentation(self.classes, self.stride, self.views.size)
        if self.backbone.startswith("vit") and self.views.size % (patch := vit_shape(self.backbone).patch):
            raise ValueError(f"views.size is {self.views.size}: {self.backbone} needs a multiple of {patch}")
        views(self)


def views(cfg: Config) -> Recipe:
    """What the method wants cut."""
    return cfg.views.recipe()


class Method(method.Method):
    """The loss is the mean cross-entropy of the labelled pixels, or, of classes in the crop, the binary one."""

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
        if self.cfg.objective == "segmentation":
            loss, right = pixel_loss(logits, truth)
            return loss, {"pixel_accuracy": right}
        present = truth.new_zeros(len(truth), VOID + 1).scatter_(1, truth.flatten(1), 1)[:, : self.cfg.classes]
        with torch.autocast(progress.device.type, enabled=False):
            pooled = method.fp32(logits).mean((2, 3))  # what the linear layer says of the mean patch
            return F.binary_cross_entropy_with_logits(pooled, present.float()), {}

    def logits(self, pixels: Tensor) -> Tensor:
        """f32 (B, 3, H, W), normalised -> (B, C, rows, columns) of the patch grid."""
        features = feature_map(self.encoder, pixels)
        return self.head(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
