"""A LOCA small enough for loops: settings, batches, methods, and every variant of the paper's tables."""

import dataclasses
from typing import Any

import pytest
import torch

from pipeline import Batch, View, recipes
from trainer.backbones import VIT_SIZES
from trainer.methods.loca import Config, Method, views

VIT_SIZES["speck"] = (16, 2, 2)
TINY = Config(
    "vit_speck_patch8",
    drop_path=0.0,
    views=recipes.Loca(size=32, focal_size=16, focal_views=2),
    query_keep=0.5,
    hidden=24,
    prototypes=8,
)
START = torch.tensor(0.0)


def tiny(**changes: Any) -> Config:
    """TINY with changes, those of its views among them."""
    inner = {f.name: changes.pop(f.name) for f in dataclasses.fields(TINY.views) if f.name in changes}
    return dataclasses.replace(TINY, views=dataclasses.replace(TINY.views, **inner), **changes)


def random_batch(cfg: Config, count: int = 3, seed: int = 0, misses: float = 0.3) -> Batch:
    """Random pixels and targets; a share of `misses` query patches has no target."""
    g = torch.Generator().manual_seed(seed)
    found, targets = {}, {}
    for cut in views(cfg).cuts:
        pixels = torch.randint(0, 256, (count, cut.count, cut.size, cut.size, 3), dtype=torch.uint8, generator=g)
        found[cut.kind] = View(pixels, torch.zeros(count, cut.count, 4))
        if cut.kind != "reference":
            n = (cfg.views.size // 8) ** 2
            places = torch.randint(0, n, (count, cut.count, cut.grid**2), dtype=torch.int32, generator=g)
            targets[cut.kind] = places.masked_fill(torch.rand(places.shape, generator=g) < misses, -1)
    if cfg.position == "box":
        low, sides = torch.rand(2, count, 1 + cfg.views.focal_views, 2, generator=g) * 0.4 + 0.1
        targets["box"] = torch.cat([low + sides / 2, sides], -1)
        targets["box"][0, 1] = -1
    return Batch(found, targets, torch.full((count,), -1), torch.arange(count))


def build(cfg: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> Method:
    """A method whose teacher has left its student, and whose biases are not all 0."""
    torch.manual_seed(seed)
    method = Method(cfg).to(dtype)
    with torch.no_grad():
        for branch in (method.student, method.teacher or method.student):
            for p, q in zip(branch.parameters(), method.student.parameters(), strict=True):
                p.add_(0.05 * torch.randn_like(p) * q.requires_grad)
    return method


VARIANTS = {
    "released": {},
    "first": {"mask": "first"},
    "unstructured": {"mask": "unstructured"},
    "everything visible": {"eta": 0.0},
    "half visible": {"eta": 0.5},
    "invisible": {"eta": 1.0},
    "per sample": {"draws": "sample"},
    "unstructured per sample": {"draws": "sample", "mask": "unstructured"},
    "one query": {"focal_views": 0},
    "two queries": {"focal_views": 1},
    "16 prototypes": {"prototypes": 16},
    "no sinkhorn": {"sinkhorn": 0},
    "no me-max": {"me_max": 0.0},
    "neither": {"sinkhorn": 0, "me_max": 0.0},
    "position only": {"clusters": "off"},
    "position only, invisible": {"clusters": "off", "eta": 1.0},
    "cluster only": {"position": "off"},
    "central patch": {"position": "centre"},
    "central patch only, per sample": {"position": "centre", "clusters": "off", "draws": "sample"},
    "box": {"position": "box"},
    "box only": {"position": "box", "clusters": "off"},
    "cls": {"clusters": "cls"},
    "gap": {"clusters": "gap"},
    "cls only": {"clusters": "cls", "position": "off"},
    "per query": {"average": "query"},
    "per query, central patch": {"average": "query", "position": "centre"},
    "all tokens of the random query": {"query_keep": 1.0},
}
EVERY = pytest.mark.parametrize("name", VARIANTS)
