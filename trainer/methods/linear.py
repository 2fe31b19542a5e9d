"""Classification by linear heads on a frozen backbone, all learning rates and weight decays on the same features.

This is VICRegL's linear evaluation (released code): mean patch feature, SGD, RandomResizedCrop and flip. Several heads
are trained at once, as in DINOv2. `python -m trainer.evaluate RUN --head sgd` trains and scores them.

Letters: B images, C classes, D channels, K heads.
"""

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import Batch, Recipe, recipes
from trainer.backbones import feature_map, named, normalise
from trainer.method import fp32
from trainer.methods._downstream import Frozen, Pretrained, normal_


@dataclass(frozen=True)
class Config(Pretrained):
    """linear classification heads on a frozen backbone"""

    size: int | None = None
    """side of the images that a ViT's position grid is made for; null: 224, or timm's default"""
    classes: int = 1000
    """number of classes"""
    scales: list[float] = field(default_factory=lambda: [1.0])
    """factors of the learning rate; there is one head for each pair of a factor and a weight decay"""
    decays: list[float] = field(default_factory=lambda: [1e-6])
    """weight decays"""
    views: recipes.Plain = field(default_factory=recipes.Plain)

    def __post_init__(self) -> None:
        """Raise ValueError for invalid settings."""
        if self.classes < 1:
            raise ValueError(f"classes is {self.classes}: it must be positive")
        if not self.scales or not self.decays or min([*self.scales, *self.decays]) < 0:
            raise ValueError(f"scales {self.scales} and decays {self.decays} must hold one number each, none below 0")
        views(self)

    @property
    def heads(self) -> list[tuple[float, float]]:
        """The factor of the learning rate and the weight decay of each head."""
        return list(product(self.scales, self.decays))


def views(cfg: Config) -> Recipe:
    """Return the recipe of the views."""
    return cfg.views.recipe()


class Method(Frozen):
    """Classification heads. The loss is the mean cross-entropy over images with a class, summed over heads."""

    def __init__(self, cfg: Config) -> None:
        encoder: Any = named(cfg.backbone, size=cfg.size, cls_token=cfg.cls_token, dilated=False)
        heads = [nn.Linear(encoder.num_features, cfg.classes) for _ in cfg.heads]
        for head in heads:
            normal_(head)
        scales, decays = zip(*cfg.heads, strict=True)
        super().__init__(cfg, encoder=encoder, heads=heads, scales=scales, decays=decays)

    def forward(self, batch: Batch, progress: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.logits(batch.views["image"].pixels)
        with torch.autocast(progress.device.type, enabled=False):
            count = (batch.label >= 0).sum().clamp(min=1)
            losses = [F.cross_entropy(fp32(one), batch.label, ignore_index=-1, reduction="sum") for one in logits]
            each = torch.stack(losses) / count
        names = [f"loss_{scale:g}_{decay:g}" for scale, decay in self.cfg.heads]
        return each.sum(), dict(zip(names, each.detach(), strict=True))

    def logits(self, pixels: Tensor) -> list[Tensor]:
        """u8 (B, 1, S, S, 3) -> (B, C) of each head."""
        with torch.no_grad():
            pooled = feature_map(self.encoder, normalise(pixels, self.mean, self.std)).mean((2, 3))
        return [head(pooled) for head in self.heads]
