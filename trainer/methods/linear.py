"""Classification by linear heads on a frozen backbone, all learning rates and weight decays on the same features.

VICRegL's linear evaluation (released code): the mean patch feature, SGD, RandomResizedCrop and flip. That several heads
are trained beside each other is DINOv2's way. `python -m trainer.evaluate RUN --head sgd` starts and scores them.

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
    size: int | None = None
    """side of the images that a ViT's positions are for; null: 224, or what timm has"""
    classes: int = 1000
    scales: list[float] = field(default_factory=lambda: [1.0])
    """a head for each, and for each weight decay: its share of the learning rate"""
    decays: list[float] = field(default_factory=lambda: [1e-6])
    views: recipes.Plain = field(default_factory=recipes.Plain)

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that mean nothing."""
        if self.classes < 1:
            raise ValueError(f"classes is {self.classes}: it must be positive")
        if not self.scales or not self.decays or min([*self.scales, *self.decays]) < 0:
            raise ValueError(f"scales {self.scales} and decays {self.decays} must hold one number each, none below 0")
        views(self)

    @property
    def heads(self) -> list[tuple[float, float]]:
        """The share of the learning rate and the weight decay of each head."""
        return list(product(self.scales, self.decays))


def views(cfg: Config) -> Recipe:
    """What the method wants cut."""
    return cfg.views.recipe()


class Method(Frozen):
    """The heads' cross-entropies are summed; images without a class do not count."""

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
