"""End-to-end semantic segmentation: a backbone and one linear layer on its patches, Segmenter's "linear decoder".

Strudel, Garcia, Laptev, Schmid, "Segmenter: Transformer for Semantic Segmentation" (arXiv 2105.05633). LOCA is
evaluated this way (arXiv 2212.02400, section 4.1). `python -m trainer.finetune` starts a training from trained weights
and scores it.

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
    """fine-tuning. Defaults: LOCA's on ADE20k, and Segmenter's where LOCA's paper leaves something open"""

    classes: int = 150
    """number of classes"""
    objective: Literal["segmentation", "multilabel"] = "segmentation"
    """predict the class of each pixel, or the set of classes in the crop from the mean patch (LOCA's Table 9)"""
    drop_path: float = 0.1
    """drop-path rate of the last block, decreasing linearly to 0 at the first"""
    stride: int | None = None
    """pixels between sliding windows when images are scored; null: the side of a window, which is that of a crop"""
    views: recipes.Segmentation = field(default_factory=recipes.Segmentation)

    def __post_init__(self) -> None:
        """Raise ValueError for invalid settings."""
        check_segmentation(self.classes, self.stride, self.views.size)
        if self.backbone.startswith("vit") and self.views.size % (patch := vit_shape(self.backbone).patch):
            raise ValueError(f"views.size is {self.views.size}: {self.backbone} needs a multiple of {patch}")
        views(self)


def views(cfg: Config) -> Recipe:
    """Return the recipe of the views."""
    return cfg.views.recipe()


class Method(method.Method):
    """A backbone and a linear layer. The loss is cross-entropy over labelled pixels, or binary over classes."""

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
            pooled = method.fp32(logits).mean((2, 3))  # equals the linear layer's logits of the mean patch
            return F.binary_cross_entropy_with_logits(pooled, present.float()), {}

    def logits(self, pixels: Tensor) -> Tensor:
        """f32 (B, 3, H, W), normalised -> (B, C, rows, columns) of the patch grid."""
        features = feature_map(self.encoder, pixels)
        return self.head(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
