"""A VICRegL small enough for loops: settings, windows, features and batches."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import Batch, recipes
from pipeline.batch import View
from pipeline.correspondence import feature_locations, pair_matches
from pipeline.windows import from_boxes
from trainer.methods.vicregl import Config, Method

# 4 x 4 cells in a large view, 2 x 2 in a small one: 16 and 4.
TINY = Config(
    backbone="vit_nano_patch16",
    drop_path=0.0,
    views=recipes.VICRegL(size=64, small=2, small_size=32, gamma=(5, 2)),
    feature_gamma=(5, 2),
    expander=(24, 24, 40),
    projector=(16, 16, 12),
)


def changed(cfg: Config, **changes: Any) -> Config:
    """`cfg` with changes, those of its views among them."""
    inner = {f.name: changes.pop(f.name) for f in fields(cfg.views) if f.name in changes}
    return replace(cfg, views=replace(cfg.views, **inner), **changes)


ALL = changed(TINY, gamma=None, feature_gamma=None)
CONV = changed(TINY, backbone="convnext_small", gamma=(3, 1), feature_gamma=(3, 1))  # 2 x 2 cells, and one


def windows(count: int, cfg: Config, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    h, w = rng.integers(40, 200, (2, count, cfg.views.large + cfg.views.small))
    y, x = rng.integers(0, 100, (2, count, cfg.views.large + cfg.views.small))
    drawn = from_boxes(np.stack([y, x, h, w], -1), rng.random(h.shape) < 0.5)
    return np.split(drawn, [cfg.views.large], axis=1)


def places(cfg: Config, large: np.ndarray, small: np.ndarray) -> list[Tensor]:
    views = [*large.swapaxes(0, 1), *small.swapaxes(0, 1)]
    return [torch.from_numpy(feature_locations(w, g)).double() for w, g in zip(views, cfg.grids, strict=True)]


def located(cfg: Config, large: np.ndarray, small: np.ndarray) -> Tensor:
    grids = {"large_grid": cfg.grids[0], "small_grid": cfg.grids[-1]}
    return torch.from_numpy(pair_matches(large, small, **grids, gamma=cfg.views.gamma))


def features(cfg: Config, count: int, width: int, seed: int = 0) -> Tensor:
    """Cells (count, T, width) that resemble each other within an image, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    cells = sum(g**2 for g in cfg.grids)
    image = torch.randn(count, 1, width, generator=generator, dtype=torch.float64)
    return image + 0.7 * torch.randn(count, cells, width, generator=generator, dtype=torch.float64) + 0.3


def batch_of(cfg: Config, count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    large, small = windows(count, cfg, seed)
    views = {}
    for kind, size, w in (("large", cfg.views.size, large), ("small", cfg.views.small_size, small)):
        if w.shape[1]:
            pixels = torch.randint(0, 256, (*w.shape[:2], size, size, 3), generator=generator, dtype=torch.uint8)
            views[kind] = View(pixels, torch.from_numpy(w))
    targets = {"matches": located(cfg, large, small)} if cfg.locations and cfg.alpha < 1 else {}
    return Batch(views, targets, torch.full((count,), -1), torch.arange(count))


def build(cfg: Config, seed: int = 0) -> Method:
    torch.manual_seed(seed)
    return Method(cfg).double()


ZERO = torch.zeros((), dtype=torch.float64)
