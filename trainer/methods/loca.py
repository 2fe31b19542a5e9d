"""LOCA: for each patch of a query view, predict its position in a reference view and its cluster there.

Caron, Houlsby, Schmid, "Location-Aware Self-Supervised Transformers for Semantic Segmentation" (arXiv 2212.02400).
Numbers that the paper leaves open are those of the released code (google-research/scenic, projects/loca).

Letters: B images, T query tokens of one image (all its query views one after another), N patches of the reference,
K prototypes, D width.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import log, pi
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from pipeline import Batch, Recipe, recipes
from trainer import method, visualise
from trainer.backbones import (
    VisionTransformer,
    block_init_,
    gelu,
    layer_norm,
    lecun_normal_,
    normalise,
    take,
    vit,
    vit_shape,
)
from trainer.methods import _loca_ablations as ablations
from trainer.parallel import mean_over_ranks, sum_over_ranks_


@dataclass(frozen=True)
class Config:
    """LOCA. Defaults: the released configuration, with 46.2 mIoU on ADE20k after 100 epochs in the paper"""

    backbone: str = "vit_base_patch16"
    """vit_SIZE_patchP. SIZE: pico or nano (for a CPU), tiny, small, base, large, huge; P: 16, 14 or 8 pixels"""
    drop_path: float = 0.1
    """drop-path rate of the last block, decreasing linearly to 0 at the first; applies to the teacher, too (released
    code)"""
    drop_path_shared: bool = False
    """drop the same branches for the reference, the random query and the first focal query of an image. The released
    code does, since three passes share one key. With separate draws, passes of a ViT-B agree for 9 % of images only"""
    views: recipes.Loca = field(default_factory=recipes.Loca)
    query_keep: float = 70 / 196
    """fraction of the random query's tokens that enter the network"""

    position: Literal["patch", "centre", "box", "single", "off"] = "patch"
    """what to locate: every query patch, the central patch of each query, the box of each query (Table 5), or every
    patch of a single view without position embeddings (after Zhai et al.; section 5.1)"""
    eta: float = 0.8
    """fraction of the reference tokens that is hidden from the queries; int((1 - eta) N) stay visible, 39 of 196. With
    1, queries have nothing to attend to and are located by their own content alone (section 5.1)"""
    mask: Literal["consecutive", "first", "unstructured"] = "consecutive"
    """which reference tokens are visible: a random run in raster order, the first ones, or a random subset"""
    draws: Literal["rank", "sample"] = "rank"
    """draw the visible and the kept tokens once per rank and step (released code), or once per image"""

    clusters: Literal["patch", "cls", "gap", "off"] = "patch"
    """what to cluster: patches, or whole views by their CLS token or mean token (Table 6b). "off" follows the released
    code: no teacher, the student also encodes the visible reference tokens, and queries get no position embeddings"""
    prototypes: int = 4096
    """number K of prototypes (Table 6c: 16 to 16384)"""
    hidden: int = 2048
    """width of the projector's two hidden layers"""
    sinkhorn: int = 3
    """number of Sinkhorn-Knopp iterations on the targets; 0 turns them off (Table 6a)"""
    me_max: float = 1.0
    """weight of the mean entropy maximisation; 0 turns it off (Table 6a)"""
    teacher_temperature: float = 0.05
    student_temperature: float = 0.1
    average: Literal["pooled", "query"] = "pooled"
    """average losses over all valid tokens of a rank (released code), or per query and then over queries (paper)"""
    momentum: float = 0.996
    """EMA momentum of the teacher at the start of the run; it rises to 1 along a cosine"""

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}: it must lie between 0 and 1")
        if not 0 < self.query_keep <= 1:
            raise ValueError(f"query_keep is {self.query_keep}: it must lie above 0 and be at most 1")
        if self.prototypes < 2 or self.sinkhorn < 0:
            raise ValueError("prototypes must be at least 2 and sinkhorn at least 0")
        if min(self.teacher_temperature, self.student_temperature) <= 0 or self.me_max < 0 or self.hidden < 1:
            raise ValueError("temperatures and hidden must be positive, and me_max not negative")
        if not (0 <= self.momentum <= 1 and 0 <= self.drop_path < 1):
            raise ValueError("momentum must lie in [0, 1] and drop_path in [0, 1)")
        if self.position == "off" and self.clusters == "off":
            raise ValueError("position and clusters are both off: nothing would be learned")
        if self.position == "single" and (self.clusters != "off" or self.eta == 1):
            raise ValueError(
                "position 'single' has no queries to cluster and no reference to hide: clusters off, eta < 1"
            )
        views(self)  # raises ValueError for an invalid backbone, size or probability

    def visible(self, total: int) -> int:
        """Return how many of `total` reference tokens the query sees."""
        return int((1 - self.eta) * total + 1e-9)  # in floating point, (1 - 0.9) * 200 is slightly below 20


def views(cfg: Config) -> Recipe:
    """Return the recipe of a reference, a random query and focal queries, with the patch targets between them."""
    patch = vit_shape(cfg.backbone).patch
    if cfg.views.patch not in (None, patch):
        raise ValueError(f"views.patch is {cfg.views.patch}: {cfg.backbone} has patches of {patch}; leave it null")
    return ablations.views(cfg, replace(cfg.views, patch=patch).recipe())


# ---- The network -----------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """A block in which query tokens attend to reference tokens only. It has no drop-path and no position embeddings.

    With ``attend=False`` there is no reference to attend to: the block is the MLP alone, without attention weights.
    """

    def __init__(self, width: int, heads: int, attend: bool) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        if attend:
            self.norm_query, self.norm_reference = layer_norm(width), layer_norm(width)
            layers = {"q": nn.Linear(width, width), "kv": nn.Linear(width, 2 * width), "proj": nn.Linear(width, width)}
            self.attn = nn.ModuleDict(layers)
        self.norm_mlp = layer_norm(width)
        self.mlp = Mlp(width, 4 * width, act_layer=gelu)
        block_init_(self)

    def forward(self, query: Tensor, reference: Tensor | None) -> Tensor:
        """(B, T, D) and (B, n, D) -> (B, T, D)."""
        if self.attend:
            q = self.attn["q"](self.norm_query(query)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            kv = self.attn["kv"](self.norm_reference(reference)).unflatten(-1, (2, self.heads, -1))
            k, v = kv.permute(2, 0, 3, 1, 4)
            query = query + self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return query + self.mlp(self.norm_mlp(query))


def mlp(widths: list[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Build linear layers between successive `widths`, with an activation between layers but not after the last."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        linear = nn.Linear(fan_in, fan_out)
        lecun_normal_(linear)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


class Clusters(nn.Module):
    """Projector and prototypes: (..., D) -> (..., K), the cosine between each feature and each prototype, in fp32."""

    def __init__(self, width: int, hidden: int, prototypes: int) -> None:
        super().__init__()
        self.projector = mlp([width, hidden, hidden, 256], gelu)
        self.prototypes = nn.Linear(256, prototypes, bias=False)
        lecun_normal_(self.prototypes)
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight))

    def forward(self, x: Tensor) -> Tensor:
        x = self.projector(x)
        with torch.autocast(x.device.type, enabled=False):  # bf16 would change a logit by up to 0.04
            weight = self.prototypes.weight
            weight = weight / (weight.norm(dim=1, keepdim=True) + 1e-10)
            return F.linear(F.normalize(x.to(weight.dtype), dim=-1), weight)


class Branch(nn.Module):
    """All modules with weights. The teacher is a copy of it. Only the modules that the configuration uses are built."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        size = cfg.views.size
        self.backbone = vit(cfg.backbone, size=size, drop_path=cfg.drop_path, cls_token=cfg.clusters == "cls")
        width, positions = self.backbone.width, self.backbone.grid**2
        if cfg.clusters != "off":
            self.clusters = Clusters(width, cfg.hidden, cfg.prototypes)
        if cfg.position in ("patch", "centre", "box"):
            self.cross = CrossAttention(width, self.backbone.heads, attend=cfg.visible(positions) > 0)
            self.norm = layer_norm(width)
        if cfg.position != "off":
            self.head = mlp([width, width, width, 4] if cfg.position == "box" else [width, positions], nn.ReLU)

    def locate(self, queries: Tensor, reference: Tensor | None) -> Tensor:
        """Return position logits of query tokens (B, T, D) that attend to visible reference tokens (B, n, D)."""
        return method.fp32(self.head(self.norm(self.cross(queries, reference))))


class Method(method.Method):
    """LOCA. The ablations of what is located and what is clustered are in _loca_ablations.py."""

    headline_metrics = ("position_accuracy", "cluster_loss")

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        recipe = views(cfg)
        self.cfg, self.mean, self.std = cfg, recipe.mean, recipe.std
        self.student = Branch(cfg)
        if cfg.position == "single" or (cfg.clusters == "off" and cfg.eta == 1):
            # This variant uses no position embeddings: they stay 0, untrained, and the exported model needs none.
            nn.init.zeros_(self.student.backbone.pos_embed).requires_grad_(False)
        self.teacher = deepcopy(self.student).requires_grad_(False) if cfg.clusters != "off" else None

    def forward(self, batch: Batch, progress: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this rank's loss, to be averaged over ranks, and its parts. `progress` is not used.

        No gradient reaches the teacher. A part of the loss is 0 if the batch has no valid correspondence for it.
        """
        cfg = self.cfg
        images = {kind: normalise(view.pixels, self.mean, self.std) for kind, view in batch.views.items()}
        if cfg.position == "single":
            return ablations.single_view(self, images["reference"])
        keep, visible = self.draw(len(images["reference"]), images["reference"].device)
        reference, seen, queries = self.encode(images, keep, visible)
        prefix = self.student.backbone.num_prefix_tokens
        patches = [view[:, prefix:] for view in queries]
        tokens, lengths = torch.cat(patches, dim=1), [view.shape[1] for view in patches]
        targets = [take(batch.targets["query"].flatten(1), keep)]
        if "focal" in images:
            targets.append(batch.targets["focal"].flatten(1))
        target = torch.cat(targets, dim=1).long()

        losses, metrics = [], {"valid_tokens": (target >= 0).float().mean()}
        if cfg.position != "off":
            if cfg.position == "patch":
                loss, metrics["position_accuracy"] = self.position_loss(tokens, seen, target, lengths)
            elif cfg.position == "centre":
                loss, metrics["position_accuracy"] = ablations.centre_loss(self, tokens, seen, target, lengths)
            else:
                loss, metrics["box_iou"] = ablations.box_loss(self, tokens, seen, batch.targets["box"], lengths)
            losses.append(loss)
            metrics["position_loss"] = loss
        if cfg.clusters != "off":
            if cfg.clusters == "patch":
                loss, parts = self.cluster_loss(tokens, reference[:, prefix:], target, lengths)
            else:
                loss, parts = ablations.image_cluster_loss(self, queries, reference)
            losses.append(loss)
            metrics |= parts
        return torch.stack(losses).sum(), {name: value.detach() for name, value in metrics.items()}

    def draw(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw the tokens of the random query that are kept, in any order, and the reference tokens that are visible.

        Both are i64: (1, n) if one draw serves all `count` images of the rank, (count, n) with one draw per image.
        """
        cfg, grid = self.cfg, self.student.backbone.grid
        total, rows = grid**2, count if cfg.draws == "sample" else 1
        order = torch.rand(rows, total, device=device)
        if cfg.position == "centre":  # the patch to locate is always kept, and comes first
            order[:, ablations.centre(grid)] = -1
        keep = order.argsort(dim=1)[:, : round(cfg.query_keep * total)]
        n = cfg.visible(total)
        if cfg.mask == "unstructured":
            return keep, torch.rand(rows, total, device=device).argsort(dim=1)[:, :n]
        run = torch.arange(n, device=device)[None]
        return keep, run if cfg.mask == "first" else run + torch.randint(total - n + 1, (rows, 1), device=device)

    def encode(
        self, images: dict[str, Tensor], keep: Tensor | None, visible: Tensor
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Return all reference tokens, the visible reference patches (B, n, D), and each query view's tokens (B, n, D).

        The teacher encodes the reference without a gradient; the student encodes the queries. Without clusters there is
        no teacher, as in the released code: the student encodes both with gradients, hidden reference patches are
        dropped before the first block, and queries get no position embeddings.
        """
        student, (count, device) = self.student.backbone, (len(images["reference"]), images["reference"].device)
        drops = focal_drops = None  # which branches to drop; with None, each pass draws its own
        if self.cfg.drop_path_shared and self.training:
            drops = torch.rand(count, len(student.blocks), 2, device=device)
            others = torch.rand(count, max(self.cfg.views.focal_views - 1, 0), *drops.shape[1:], device=device)
            focal_drops = torch.cat([drops[:, None], others], dim=1).flatten(0, 1)
        if self.teacher is None:
            reference, positions = images["reference"].new_empty(0), False
            seen = student(images["reference"], visible, drops=drops) if visible.shape[1] else None
        else:
            with torch.no_grad():
                reference, positions = self.teacher.backbone(images["reference"], drops=drops), True
                seen = take(reference[:, student.num_prefix_tokens :], visible)
        queries = [student(images["query"], keep, positions=positions, drops=drops)]
        if "focal" in images:
            focal = student(images["focal"], positions=positions, drops=focal_drops)  # rows are image-major
            queries += focal.unflatten(0, (count, -1)).unbind(1)
        return reference, seen, queries

    def position_loss(
        self, tokens: Tensor, seen: Tensor | None, target: Tensor, lengths: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of equation 2 and the accuracy. tokens (B, T, D), seen reference (B, n, D), target (B, T)."""
        logits = self.student.locate(tokens, seen)
        loss = F.cross_entropy(logits.mT, target, ignore_index=-1, reduction="none")
        valid = target >= 0
        return self.average(loss, valid, lengths), pooled((logits.argmax(-1) == target).to(loss.dtype), valid)

    def cluster_loss(
        self, queries: Tensor, reference: Tensor, rows: Tensor, lengths: list[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of equation 1 plus mean entropy maximisation, and its parts.

        Shapes: queries (B, T, D), reference (B, R, D), rows (B, T) in -1..R-1. Each query token predicts the cluster
        assignment of the reference feature that `rows` names in the same image. A token with -1 has no target, but
        still counts in the mean prediction over all ranks, whose entropy is maximised.
        """
        cfg, teacher = self.cfg, self.teacher
        assert teacher is not None
        with torch.no_grad():
            scores = teacher.clusters(reference) / cfg.teacher_temperature
            assigned = sinkhorn(scores.flatten(0, 1).softmax(-1), cfg.sinkhorn).view_as(scores)
        prediction = F.log_softmax(self.student.clusters(queries) / cfg.student_temperature, dim=-1)
        images = torch.arange(len(rows), device=rows.device)[:, None]
        cross_entropy = -(assigned[images, rows.clamp(min=0)] * prediction).sum(-1)
        loss = self.average(cross_entropy, rows >= 0, lengths)

        mean = mean_over_ranks(prediction.exp().mean(dim=(0, 1)))
        negative_entropy = (mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()  # 0 has no logarithm
        used = scores.new_zeros(cfg.prototypes).scatter_(0, assigned.argmax(-1).flatten(), 1.0)
        return loss + cfg.me_max * negative_entropy, {
            "cluster_loss": loss,
            "me_max": (negative_entropy + log(cfg.prototypes)).clamp(min=0),  # KL divergence to uniform
            "target_entropy": torch.special.entr(assigned).sum(-1).mean(),
            "prototypes_in_use": used.sum(),
        }

    def average(self, x: Tensor, valid: Tensor, lengths: list[int]) -> Tensor:
        """Return the mean of `x` (B, T) over valid tokens, or the mean over query views of each view's mean.

        Query views without a valid token do not count. `cfg.average` chooses between the two.
        """
        if self.cfg.average == "pooled":
            return pooled(x, valid)
        sums = torch.stack([view.sum(1) for view in (x * valid).split(lengths, dim=1)], dim=1)
        counts = torch.stack([view.sum(1) for view in valid.split(lengths, dim=1)], dim=1)
        return pooled(sums / counts.clamp(min=1), counts > 0)

    @torch.no_grad()
    def after_step(self, progress: Tensor) -> None:
        """Move the teacher's parameters towards the student's by a factor of 1 - momentum."""
        if self.teacher is None:
            return
        rate = self.rate(progress)
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = list(self.student.parameters())
        step = torch._foreach_sub(student, teacher)
        torch._foreach_mul_(step, rate.to(student[0].device))  # lerp would need the rate on the host
        torch._foreach_add_(teacher, step)

    def rate(self, progress: Tensor) -> Tensor:
        """Return 1 - momentum of the teacher, which falls to 0 along a cosine."""
        return (1 - self.cfg.momentum) * 0.5 * (1 + torch.cos(pi * progress))

    def scheduled(self, progress: Tensor) -> dict[str, Tensor]:
        return {} if self.teacher is None else {"ema_momentum": 1 - self.rate(progress)}

    def backbone(self) -> VisionTransformer:
        """Return the teacher's backbone, which the paper evaluates, or the student's if there is no teacher."""
        return (self.student if self.teacher is None else self.teacher).backbone

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return two groups. Matrices, position embeddings, prototypes and q, k, v biases decay (released code)."""
        decayed: list[Tensor] = []
        exempt: list[Tensor] = []
        for name, parameter in self.student.named_parameters():
            if not parameter.requires_grad:
                continue
            bias = name.endswith((".qkv.bias", ".q.bias", ".kv.bias"))
            (decayed if parameter.ndim > 1 or bias else exempt).append(parameter)
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]

    def picture(self, batch: Batch, path: Path) -> bool:
        """Draw the query windows, the predicted places of their patches, and the true ones."""
        places, visible = self.place(batch)
        if places:  # not every variant locates patches
            visualise.placements(path, batch, places, visible, grid=self.student.backbone.grid)
        return bool(places)

    @torch.no_grad()
    def place(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Return the predicted place of every query patch, and the reference patches that were visible, for pictures.

        Places are i64 (B, V, n) by kind of view, laid out like the targets; visible patches are i64 (1 or B, n). No
        query token is dropped. Places are empty if the variant locates no patches (position "box", "single" or "off").
        Call `eval()` first.
        """
        images = {kind: normalise(view.pixels, self.mean, self.std) for kind, view in batch.views.items()}
        _, visible = self.draw(len(images["reference"]), images["reference"].device)
        if self.cfg.position not in ("patch", "centre"):
            return {}, visible
        _, seen, queries = self.encode(images, None, visible)
        prefix = self.student.backbone.num_prefix_tokens
        places = [self.student.locate(view[:, prefix:], seen).argmax(-1) for view in queries]
        kinds = {"query": torch.stack(places[:1], dim=1)}
        return kinds | ({"focal": torch.stack(places[1:], dim=1)} if places[1:] else {}), visible


# ---- Formulas --------------------------------------------------------------------------------------------------------


def pooled(x: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of `x` where `valid`, or 0 if nothing is valid."""
    valid = valid.to(x.dtype)
    return (x * valid).sum() / (valid.sum() + 1e-8)


def sinkhorn(p: Tensor, iterations: int) -> Tensor:
    """Balance the use of the K clusters over the rows of p (n, K) on all ranks. Rows of the result sum to 1.

    Each iteration divides columns by their sums over all ranks, then rows by their sums. Only the two scaling vectors
    are iterated: the matrix is read in each iteration, and written once.
    """
    if iterations == 0:
        return p
    rows = p.new_ones(len(p), 1)
    for _ in range(iterations):
        columns = 1 / sum_over_ranks_((p * rows).sum(0)).clamp(min=torch.finfo(p.dtype).tiny)  # of an unused cluster
        rows = 1 / (p * columns).sum(1, keepdim=True)
    return p * columns * rows
