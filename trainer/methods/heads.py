"""Semantic segmentation by linear heads on a frozen backbone, several learning rates at once on the same features.

The published recipes are presets: `heads` is DINOv3's evaluation, `heads_vicregl` and `heads_vicregl_resnet50` are
VICRegL's. `python -m trainer.segment WHAT --head sgd` trains and scores the heads.

Letters: B images, C classes, D channels, K heads.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline import Batch, Recipe, recipes
from trainer.backbones import BatchNorm, feature_map, named, normalise, stride
from trainer.methods._downstream import Frozen, Pretrained, check_segmentation, normal_, pixel_loss


@dataclass(frozen=True)
class Config(Pretrained):
    """linear segmentation heads. Defaults: DINOv3's linear evaluation on ADE20k"""

    size: int | None = None
    """side of the images that a ViT's position grid is made for; null: 224, or timm's default"""
    layers: list[int] = field(default_factory=lambda: [-1])
    """blocks of a ViT or stages of a convolutional network whose maps are concatenated, at the finest stride"""
    norm: bool = True
    """apply the backbone's final norm"""
    classes: int = 150
    """number of classes"""
    scales: list[float] = field(default_factory=lambda: [1.0])
    """one head per entry, which is a factor of the learning rate"""
    dropout: float = 0.1
    """probability of dropping a whole channel"""
    dropout_first: bool = True
    """apply dropout before the batch norm (DINOv3), not after it (mmsegmentation, and thus VICRegL)"""
    whole: bool = False
    """score whole images instead of sliding windows of the size of the training crops"""
    stride: int | None = 341
    """pixels between sliding windows when images are scored; null: the side of a window"""
    views: recipes.Segmentation = field(default_factory=recipes.Segmentation)

    def __post_init__(self) -> None:
        """Raise ValueError for invalid settings."""
        check_segmentation(self.classes, self.stride, self.views.size)
        if not self.scales or min(self.scales) < 0:
            raise ValueError(f"scales are {self.scales}: a share of the learning rate for each head, at least one")
        views(self)


def views(cfg: Config) -> Recipe:
    """Return the recipe of the views."""
    return cfg.views.recipe()


class Head(nn.Module):
    """Batch norm, dropout and a linear layer on every cell."""

    def __init__(self, width: int, cfg: Config) -> None:
        super().__init__()
        self.norm, self.dropout = BatchNorm(width), nn.Dropout2d(cfg.dropout)
        self.linear = nn.Conv2d(width, cfg.classes, 1)
        self._dropout_first = cfg.dropout_first
        normal_(self.linear)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, rows, columns) -> (B, C, rows, columns)."""
        return self.linear(self.norm(self.dropout(x)) if self._dropout_first else self.dropout(self.norm(x)))


class Method(Frozen):
    """Segmentation heads. The loss is the mean cross-entropy over labelled pixels, summed over heads."""

    def __init__(self, cfg: Config) -> None:
        with torch.no_grad():
            encoder = named(cfg.backbone, size=cfg.size, cls_token=cfg.cls_token).eval()
            side = 2 * stride(encoder)
            width = feature_map(encoder, torch.zeros(1, 3, side, side), cfg.layers, norm=cfg.norm).shape[1]
        heads = [Head(width, cfg) for _ in cfg.scales]
        super().__init__(cfg, encoder=encoder, heads=heads, scales=cfg.scales, decays=[None] * len(heads))
        self.window, self.stride = None if cfg.whole else cfg.views.size, cfg.stride

    def forward(self, batch: Batch, progress: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        view = batch.views["image"]
        assert view.mask is not None  # the recipe asks for it
        truth = view.mask.flatten(0, 1).long()
        features = self.features(normalise(view.pixels, self.mean, self.std))
        loss, metrics = torch.zeros((), device=progress.device), {}
        for scale, head in zip(self.cfg.scales, self.heads, strict=True):
            own, _ = pixel_loss(head(features), truth)
            loss = loss + own
            metrics[f"loss_{scale:g}"] = own.detach()
        return loss, metrics

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """f32 (B, 3, H, W), normalised -> (B, D, rows, columns)."""
        return feature_map(self.encoder, pixels, self.cfg.layers, norm=self.cfg.norm)

    def logits(self, pixels: Tensor) -> Tensor:
        """f32 (B, 3, H, W), normalised -> (B, K * C, rows, columns), one head after another."""
        features = self.features(pixels)
        return torch.cat([head(features) for head in self.heads], 1)
