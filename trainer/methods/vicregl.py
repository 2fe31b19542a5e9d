"""VICRegL: VICReg on whole views, and on cells of two views that show the same place or have similar features.

Bardes, Ponce, LeCun, "VICRegL: Self-Supervised Learning of Local Visual Features" (arXiv 2210.01571). What the paper
leaves open follows the released code (facebookresearch/VICRegL).

Letters: B images of this rank, n images of all ranks, N views, T cells of all views of an image one after another, D
width. A slot is one matched pair of cells of a pair of views; its statistics run over the n images.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import Batch, Recipe, recipes
from trainer import method
from trainer.backbones import BatchNorm, convnet, normalise, vit, vit_shape
from trainer.parallel import gather, rank, world_size


@dataclass(frozen=True)
class Config:
    """VICRegL. Defaults: the ConvNeXt-S run (Table 2: 74.6 % linear top-1, 67.5 mIoU on frozen VOC, 400 epochs)"""

    backbone: str = "convnext_small"
    """resnet50, convnext_{tiny,small,base,large,xlarge}, or vit_SIZE_patchP as in LOCA"""
    drop_path: float = 0.1
    """drop-path rate of the last block, decreasing linearly to 0 at the first (released code; with ResNet-50, set 0)"""
    views: recipes.VICRegL = field(default_factory=recipes.VICRegL)

    alpha: float = 0.75
    """weight of the global loss; the local loss has 1 - alpha. 1 is VICReg, 0 is local only (Fig. 2: 0.9 and 0.75)"""
    locations: bool = True
    """match cells by location (L_s). If false, this half of the local loss is left out"""
    features: bool = True
    """match cells by feature distance (L_d). If false, this half of the local loss is left out"""
    feature_gamma: tuple[int, int] | None = (20, 4)
    """like views.gamma, for matches by features. null: the released code's default, unintended by its author"""

    criterion: Literal["vicreg", "simclr"] = "vicreg"
    """"simclr" replaces VICReg by the contrastive loss, both globally and in each slot: SimCLR-L (Table 4)"""
    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    """weights of VICReg's three terms, in the global and the local loss alike; 0 leaves a term out (Table 7)"""
    temperature: float = 0.1
    """temperature of the contrastive loss (SimCLR's value; the paper states none)"""
    expander: tuple[int, ...] = (8192, 8192, 8192)
    """layer widths of the head on each view's mean feature"""
    projector: tuple[int, ...] = (512, 512, 512)
    """layer widths of the head on each cell's feature"""

    def __post_init__(self) -> None:
        v, stride, grids = self.views, self.stride, self.grids
        if v.large < 1 or v.small < 0 or v.large + v.small < 2:
            raise ValueError(f"large is {v.large}, small {v.small}: a large view and another one are needed")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}: it must lie between 0 and 1")
        if self.alpha < 1 and not (self.locations or self.features):
            raise ValueError("locations and features are both off: alpha 1 trains without a local loss")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}: it must be positive")
        if not (self.expander and self.projector and 0 <= self.drop_path < 1):
            raise ValueError("expander and projector need a width at least, and drop_path lies in [0, 1)")
        if v.stride not in (None, stride):
            raise ValueError(f"views.stride is {v.stride}: {self.backbone} has a stride of {stride}; leave it null")
        for name, size in (("size", v.size), ("small_size", v.small_size)):
            if size < stride or size % stride:
                raise ValueError(f"{name} is {size}: {self.backbone} needs a multiple of {stride}")
        for name, gamma in (("gamma", v.gamma), ("feature_gamma", self.feature_gamma)):
            most, fewest = grids[0] ** 2, min(grids) ** 2
            if gamma is not None and self.alpha < 1 and not (1 <= gamma[0] <= most and 1 <= gamma[1] <= fewest):
                raise ValueError(f"{name} is {gamma}: at most {most} and {fewest} cells can match, at least 1")
        views(self)  # raises ValueError for an invalid probability or scale

    @property
    def stride(self) -> int:
        """Side of a cell in pixels."""
        return vit_shape(self.backbone).patch if self.backbone.startswith("vit") else 32

    @property
    def grids(self) -> list[int]:
        """Number of cells per side of each view."""
        v, stride = self.views, self.stride
        return [v.size // stride] * v.large + [v.small_size // stride] * v.small


def views(cfg: Config) -> Recipe:
    """Return the recipe of large and small views, with the pairs of closest cells as "matches", i32 (B, M, 2)."""
    recipe = replace(cfg.views, stride=cfg.stride).recipe()
    return recipe if cfg.locations and cfg.alpha < 1 else replace(recipe, targets=None)


# ---- Matching cells --------------------------------------------------------------------------------------------------


class Term(NamedTuple):
    """Each cell of view `query` is matched to one of view `candidate`; the `kept` best matches enter the loss."""

    query: int
    candidate: int
    kept: int
    start: int  # the term's first slot among the targets "matches"
    weight: float  # of all kept matches together


def terms(grids: list[int], large: int, gamma: tuple[int, int] | None) -> list[Term]:
    """Return the terms of one half of the local loss, by location or by features.

    The half is a mean over ordered pairs of views and over the two directions of each pair. Two pairs may need the
    same term, as pairs (0, 1) and (1, 0) do when all cells are kept. It is then computed once, with the summed weight.
    """
    pairs = [(i, j) for i in range(large) for j in range(len(grids)) if i != j]
    found: dict[tuple[int, int, int], Term] = {}
    start = 0
    for pair in pairs:
        for direction, (query, candidate) in enumerate((pair, pair[::-1])):
            kept = gamma[direction] if gamma else grids[query] ** 2
            term = found.get((query, candidate, kept), Term(query, candidate, kept, start, 0.0))
            found[query, candidate, kept] = term._replace(weight=term.weight + 0.5 / len(pairs))
            start += kept
    return list(found.values())


class Matches(nn.Module):
    """Finds the cells to compare in each image, and holds the weight of each comparison."""

    slot_weight: Tensor
    fixed_cells: Tensor
    varying_slots: Tensor
    side_weight: Tensor

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        grids, large = cfg.grids, cfg.views.large
        cells = [grid**2 for grid in grids]
        self.first = [sum(cells[:v]) for v in range(len(cells) + 1)]  # index of each view's first cell among all T
        self.large = self.first[large]  # number of cells in large views; every pair includes a large view
        self.locations = terms(grids, large, cfg.views.gamma) if cfg.locations else []
        self.features = terms(grids, large, cfg.feature_gamma) if cfg.features else []

        with torch.device("cpu"):  # real values even if the method is built on the meta device
            slot_weight, varying = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.long)
            cell_weight = torch.zeros(self.first[-1], dtype=torch.float64)
            for term in self.locations + self.features:
                weight = torch.full((term.kept,), term.weight / term.kept, dtype=torch.float64)
                if term.kept == cells[term.query]:  # slot k is cell k in every image, so terms share its statistics
                    cell_weight[self.first[term.query] : self.first[term.query + 1]] += weight
                else:
                    varying = torch.cat([varying, torch.arange(len(slot_weight), len(slot_weight) + term.kept)])
                slot_weight = torch.cat([slot_weight, weight])
            fixed = cell_weight.nonzero()[:, 0]
            side_weight = torch.cat([cell_weight[fixed], slot_weight[varying], slot_weight]) / 2
        self.register_buffer("slot_weight", slot_weight, persistent=False)  # (M,)
        self.register_buffer("fixed_cells", fixed, persistent=False)  # query cells that are the same in every image
        self.register_buffer("varying_slots", varying, persistent=False)  # slots whose query cell depends on the image
        self.register_buffer("side_weight", side_weight, persistent=False)  # (S,), in the order of `sides`

    def forward(self, squared: Tensor, located: Tensor | None) -> Tensor:
        """Squared feature distances (B, cells of large views, T), location matches (B, M', 2) -> slots (B, M, 2)."""
        found = []
        if located is not None:
            found += [located[:, t.start : t.start + t.kept].long() for t in self.locations]
        found += [self._nearest(squared, term) for term in self.features]
        return torch.cat(found, dim=1)

    def _nearest(self, squared: Tensor, term: Term) -> Tensor:
        """Return the `kept` closest pairs (query cell, its nearest candidate cell) of a term: (B, kept, 2)."""
        a, b = (slice(self.first[v], self.first[v + 1]) for v in (term.query, term.candidate))
        block = squared[:, a, b] if a.stop <= self.large else squared[:, b, a].mT
        distance, nearest = block.min(dim=2)
        if term.kept < distance.shape[1]:
            cell = distance.topk(term.kept, largest=False).indices.sort(dim=1).values
            nearest = nearest.gather(1, cell)
        else:
            cell = torch.arange(term.kept, device=squared.device).expand_as(nearest)
        return torch.stack([cell + a.start, nearest + b.start], dim=2)

    def sides(self, slots: Tensor) -> Tensor:
        """Return the cells (B, S) on both sides of the slots (B, M, 2); query cells equal in every image come once."""
        fixed = self.fixed_cells.expand(len(slots), -1)
        return torch.cat([fixed, slots[:, self.varying_slots, 0], slots[..., 1]], dim=1)


# ---- The network and its loss ----------------------------------------------------------------------------------------


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(B, P, D) and (B, R, D) -> (B, P, R), by a matrix product that avoids the P x R x D differences.

    The features of an image have a large common mean. It is subtracted first, so that the product cancels few digits.
    """
    centre = b.mean(1, keepdim=True).detach()
    a, b = a - centre, b - centre
    return (a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None, :]).baddbmm(a, b.mT, alpha=-2)


class _Regularity(torch.autograd.Function):
    """Weighted sum of VICReg's variance and covariance terms over many slots: value and gradient in one pass.

    The gradient has a closed form. Therefore the n x D features of a slot, gathered from the cells, are only needed
    while their chunk is computed; one gradient of the size of `cells` is kept. A slot takes 4 n D min(n, D)
    multiplications: with n <= D, the sum of squared covariances is computed from the n x n Gram matrix (same sum).
    """

    @staticmethod
    def forward(ctx: Any, cells: Tensor, rows: Tensor, weight: Tensor, variance: float, covariance: float) -> Tensor:
        """cells (R, D), rows i64 (S, n) of cells, weight (S,) -> (3,): the sum, its variance and covariance parts."""
        n, d = rows.shape[1], cells.shape[1]
        dof = max(n - 1, 1)
        gradient = torch.zeros_like(cells)
        parts = cells.new_zeros(2)
        in_flight = 2**20 if cells.device.type == "cpu" else 2**25  # numbers: to fit a CPU's cache, to keep a GPU busy
        chunk = max(1, in_flight // (n * max(n, d)))
        for index, w in zip(rows.split(chunk), weight.split(chunk), strict=True):
            x = cells.index_select(0, index.flatten()).unflatten(0, (-1, n))
            x = x - x.mean(1, keepdim=True)
            if n <= d:
                product = x @ x.mT
                var = x.square().sum(1) / dof
            else:
                product = x.mT @ x
                var = product.diagonal(dim1=1, dim2=2) / dof
            std = (var + 1e-4).sqrt()
            hinge = (1 - std).relu().mean(1)
            squares = torch.linalg.vector_norm(product.flatten(1), dim=1) / dof
            off_diagonal = (squares.square() - var.square().sum(1)) / d
            parts = parts + torch.stack([variance * (w @ hinge), covariance * (w @ off_diagonal)])

            scale = (4 * covariance / (d * dof)) * w
            per_channel = (-variance / (d * dof)) * w[:, None] * (std < 1) / std - scale[:, None] * var
            scale = (scale / dof)[:, None, None]
            if n <= d:
                change = torch.baddbmm(x * per_channel[:, None, :], product * scale, x)
            else:
                change = x @ (product * scale + torch.diag_embed(per_channel))
            gradient.index_add_(0, index.flatten(), change.flatten(0, 1))
        ctx.save_for_backward(gradient)
        return torch.cat([parts.sum()[None], parts])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grads[0][0] * gradient, None, None, None, None


def contrast(cells: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """Return SimCLR's loss of each slot, (S,). cells (R, D); rows i64 (S, n, 2): matched cells, the positives.

    The cells of all other images in a slot are the negatives.
    """
    x = F.normalize(cells[rows.mT.flatten(1)], dim=2)
    images = rows.shape[1]
    logits = x @ x.mT / temperature
    own = torch.eye(2 * images, dtype=torch.bool, device=x.device)
    partner = logits.diagonal(images, 1, 2).sum(1) * 2  # the matrix is symmetric
    return (logits.masked_fill(own, -torch.inf).logsumexp(2).sum(1) - partner) / (2 * images)


def my_slots(cells: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return all ranks' cells (n*T, D) in fp32, and rows (s, n, ...) and weights (s,) of this rank's share of slots.

    The inputs are all ranks' cells (n, T, D), the cell index (n, S, ...) of each slot within its image, and weights
    (S,). Weights are multiplied by the number of ranks, because the trainer averages the loss over ranks.
    """
    share = slice(rank(), None, world_size())
    first = torch.arange(len(cells), device=index.device) * cells.shape[1]
    rows = index[:, share].transpose(0, 1) + first.reshape(-1, *(1,) * (index.ndim - 2))
    return method.fp32(cells).flatten(0, 1), rows, weight[share] * world_size()


def spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean standard deviation of L2-normalised features (B, D), and the mean correlation of two channels.

    Values of 0 and 1 indicate collapse. The sum over all pairs of channels is the square of a sum, so that no D x D
    matrix is needed.
    """
    x = method.fp32(x.detach())
    std = F.normalize(x, dim=1).std(0, correction=min(len(x) - 1, 1)).mean()
    x = x - x.mean(0)
    x = x / (x.square().mean(0).sqrt() + 1e-5)
    pairs = x.shape[1] * max(x.shape[1] - 1, 1)
    return std, (x.sum(1).square().mean() - x.square().sum(1).mean()) / pairs


class Objective(nn.Module):
    """The global loss of embeddings and the local loss of cells. Each rank computes a share of the mean over ranks.

    The ranks exchange embeddings, cells and indices. Gathered slots would be ten times as many numbers.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.alpha < 1:
            self.matches = Matches(cfg)

    def global_loss(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Return VICReg's loss of embeddings (B, N, D): variance, covariance per view, invariance per ordered pair."""
        cfg, large, (count, n_views, width) = self.cfg, self.cfg.views.large, embeddings.shape
        pairs = large * (n_views - 1)
        e, everyone = method.fp32(embeddings), gather(embeddings)
        if cfg.criterion == "simclr":
            which = [(i, j) for i in range(large) for j in range(i + 1, n_views)]
            weight = e.new_tensor([(2 if j < large else 1) / pairs for _, j in which])
            slots = torch.tensor(which, device=e.device).expand(len(everyone), -1, -1)
            return self.contrastive(everyone, slots, weight)
        difference = e[:, :large, None] - e[:, None]
        invariance = cfg.invariance / (pairs * count * width) * difference.square().sum()
        index = torch.arange(n_views, device=e.device).expand(len(everyone), -1)
        return self.regularised(invariance, everyone, index, e.new_full((n_views,), 1 / n_views))

    def local_loss(self, cells: Tensor, located: Tensor | None) -> dict[str, Tensor]:
        """Return the loss of cells (B, T, D) matched by location (B, M', 2) and by features; weights as in `terms`."""
        z, everyone, matches = method.fp32(cells), gather(cells), self.matches
        squared = squared_distances(z[:, : matches.large], z)
        slots = matches(squared.detach(), located)
        if self.cfg.criterion == "simclr":
            return self.contrastive(everyone, gather(slots.int()), matches.slot_weight.to(z.dtype))
        # Each slot has a cell of a large view, and those have the lowest indices. `squared` thus covers every slot.
        where = torch.minimum(slots[..., 0], slots[..., 1]) * z.shape[1] + torch.maximum(slots[..., 0], slots[..., 1])
        weight = matches.slot_weight.to(z.dtype) * (self.cfg.invariance / (len(z) * z.shape[2]))
        invariance = (squared.flatten(1).gather(1, where) * weight).sum()
        sides = gather(matches.sides(slots).int())
        return self.regularised(invariance, everyone, sides, matches.side_weight.to(z.dtype))

    def regularised(self, invariance: Tensor, cells: Tensor, index: Tensor, weight: Tensor) -> dict[str, Tensor]:
        total, variance, covariance = _Regularity.apply(
            *my_slots(cells, index, weight), self.cfg.variance, self.cfg.covariance
        ).unbind()
        loss = invariance + total
        return {"loss": loss, "invariance": invariance, "variance": variance, "covariance": covariance}

    def contrastive(self, cells: Tensor, slots: Tensor, weight: Tensor) -> dict[str, Tensor]:
        cells, rows, weight = my_slots(cells, slots, weight)
        loss = weight @ contrast(cells, rows, self.cfg.temperature)
        return {"loss": loss, "contrast": loss}


class Head(nn.Sequential):
    """Linear layers. All but the last are followed by a norm and ReLU; the last has no bias (released code)."""

    def __init__(self, width: int, widths: tuple[int, ...], norm: Any) -> None:
        layers: list[nn.Module] = []
        for hidden in widths[:-1]:
            layers += [nn.Linear(width, hidden), norm(hidden), nn.ReLU()]
            width = hidden
        super().__init__(*layers, nn.Linear(width, widths[-1], bias=False))


class Method(method.Method):
    """VICRegL. Batch norm, used with ResNet-50, sees the cells of one view at a time (released code)."""

    headline_metrics = ("embedding_std", "global_invariance")

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        recipe = views(cfg)
        self.cfg, self.mean, self.std = cfg, recipe.mean, recipe.std
        self.encoder: Any = (
            vit(cfg.backbone, size=cfg.views.size, drop_path=cfg.drop_path)
            if cfg.backbone.startswith("vit")
            else convnet(cfg.backbone, drop_path=cfg.drop_path)
        )
        self.one_by_one = any(isinstance(m, BatchNorm) for m in self.encoder.modules())
        norm = BatchNorm if self.one_by_one else nn.LayerNorm
        if cfg.alpha > 0:
            self.expander = Head(self.encoder.width, cfg.expander, norm)
        if cfg.alpha < 1:
            self.projector = Head(self.encoder.width, cfg.projector, norm)
        self.objective = Objective(cfg)

    def backbone(self) -> nn.Module:
        return self.encoder

    def forward(self, batch: Batch, progress: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        maps = [view for kind in ("large", "small") if kind in batch.views for view in self.encode(batch, kind)]
        pooled = [view.mean(1, keepdim=True) for view in maps]
        embeddings = self.on_views(self.expander, pooled) if self.cfg.alpha > 0 else None
        cells = self.on_views(self.projector, maps) if self.cfg.alpha < 1 else None
        loss, metrics = torch.zeros((), device=progress.device), {}
        with torch.autocast(progress.device.type, enabled=False):
            metrics["feature_std"], metrics["feature_correlation"] = spread(pooled[0][:, 0])
            if embeddings is not None:
                metrics["embedding_std"], metrics["embedding_correlation"] = spread(embeddings[:, 0])
                parts = self.objective.global_loss(embeddings)
                loss = loss + self.cfg.alpha * parts.pop("loss")
                metrics |= {f"global_{name}": part.detach() for name, part in parts.items()}
            if cells is not None:
                parts = self.objective.local_loss(cells, batch.targets.get("matches"))
                loss = loss + (1 - self.cfg.alpha) * parts.pop("loss")
                metrics |= {f"local_{name}": part.detach() for name, part in parts.items()}
        return loss, metrics

    def encode(self, batch: Batch, kind: str) -> list[Tensor]:
        """Return the feature maps (B, cells, D) of each view of a kind."""
        pixels = batch.views[kind].pixels
        x = normalise(pixels, self.mean, self.std).unflatten(0, pixels.shape[:2])
        if self.one_by_one:
            return [self.encoder(view) for view in x.unbind(1)]
        return list(self.encoder(x.flatten(0, 1)).unflatten(0, pixels.shape[:2]).unbind(1))

    def on_views(self, head: Head, maps: list[Tensor]) -> Tensor:
        """Apply `head` to maps (B, cells, D) of each view -> (B, T, D'), all views one after another."""
        if self.one_by_one:
            maps = [head(view.flatten(0, 1)).unflatten(0, view.shape[:2]) for view in maps]
            return torch.cat(maps, dim=1)
        return head(torch.cat(maps, dim=1))
