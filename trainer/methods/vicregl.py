"""VICRegL: the views of an image agree as wholes, and where they show the same place or look alike.

Bardes, Ponce, LeCun, "VICRegL: Self-Supervised Learning of Local Visual Features" (arXiv 2210.01571), with what the
paper leaves open taken from the released code (facebookresearch/VICRegL).

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
    """The defaults are the ConvNeXt-S run: 74.6 % linear top-1, 67.5 mIoU on frozen VOC after 400 epochs (Table 2)."""

    backbone: str = "convnext_small"
    """resnet50, convnext_{tiny,small,base,large,xlarge}, or vit_SIZE_patchP as LOCA has them"""
    drop_path: float = 0.1
    """of the last block, falling linearly to 0 at the first (released code; ResNet-50 has none: set 0)"""
    views: recipes.VICRegL = field(default_factory=recipes.VICRegL)

    alpha: float = 0.75
    """weight of the global loss, 1 - alpha of the local one; 1 is VICReg, 0 is local only (Fig. 2: 0.9 and 0.75)"""
    locations: bool = True
    """match cells by where they lie (L_s); without, its half of the local loss is missing"""
    features: bool = True
    """match cells by their features' distance (L_d); without, its half of the local loss is missing"""
    feature_gamma: tuple[int, int] | None = (20, 4)
    """as views.gamma, for feature matches; null is the released code's default, which its author says should not be"""

    criterion: Literal["vicreg", "simclr"] = "vicreg"
    """"simclr" puts the contrastive loss in VICReg's place, globally and in each slot: SimCLR-L (Table 4)"""
    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    """weights of VICReg's parts, the same globally and locally; 0 leaves a part out (Table 7)"""
    temperature: float = 0.1
    """of the contrastive loss (SimCLR's; the paper names none)"""
    expander: tuple[int, ...] = (8192, 8192, 8192)
    """widths of the head on the mean feature"""
    projector: tuple[int, ...] = (512, 512, 512)
    """widths of the head on every cell's feature"""

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
        views(self)  # names a probability or a scale that cannot be

    @property
    def stride(self) -> int:
        """Pixels per side of a cell."""
        return vit_shape(self.backbone).patch if self.backbone.startswith("vit") else 32

    @property
    def grids(self) -> list[int]:
        """Cells per side of every view."""
        v, stride = self.views, self.stride
        return [v.size // stride] * v.large + [v.small_size // stride] * v.small


def views(cfg: Config) -> Recipe:
    """Large and small views, and which of their cells lie closest: "matches" i32 (B, M, 2)."""
    recipe = replace(cfg.views, stride=cfg.stride).recipe()
    return recipe if cfg.locations and cfg.alpha < 1 else replace(recipe, targets=None)


# ---- What is compared with what --------------------------------------------------------------------------------------


class Term(NamedTuple):
    """The cells of view `query` looking for a match in view `candidate`; the best `kept` count, together `weight`."""

    query: int
    candidate: int
    kept: int
    start: int  # its first slot among the targets "matches"
    weight: float


def terms(grids: list[int], large: int, gamma: tuple[int, int] | None) -> list[Term]:
    """The terms of one part of the local loss: a mean over ordered pairs, half for each direction, half for the part.

    Two pairs may ask the same of the same views (0 to 1, when all cells are kept): such a term is computed once.
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
    """Which cells are compared in an image, and how much each comparison counts."""

    slot_weight: Tensor
    fixed_cells: Tensor
    varying_slots: Tensor
    side_weight: Tensor

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        grids, large = cfg.grids, cfg.views.large
        cells = [grid**2 for grid in grids]
        self.first = [sum(cells[:v]) for v in range(len(cells) + 1)]  # of each view's cells among all T
        self.large = self.first[large]  # cells of large views: every pair has one of them
        self.locations = terms(grids, large, cfg.views.gamma) if cfg.locations else []
        self.features = terms(grids, large, cfg.feature_gamma) if cfg.features else []

        with torch.device("cpu"):  # also where the rest is made without contents, to estimate what it costs
            slot_weight, varying = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.long)
            cell_weight = torch.zeros(self.first[-1], dtype=torch.float64)
            for term in self.locations + self.features:
                weight = torch.full((term.kept,), term.weight / term.kept, dtype=torch.float64)
                if term.kept == cells[term.query]:  # slot k queries with cell k in every image: one for all such terms
                    cell_weight[self.first[term.query] : self.first[term.query + 1]] += weight
                else:
                    varying = torch.cat([varying, torch.arange(len(slot_weight), len(slot_weight) + term.kept)])
                slot_weight = torch.cat([slot_weight, weight])
            fixed = cell_weight.nonzero()[:, 0]
            side_weight = torch.cat([cell_weight[fixed], slot_weight[varying], slot_weight]) / 2
        self.register_buffer("slot_weight", slot_weight, persistent=False)  # (M,)
        self.register_buffer("fixed_cells", fixed, persistent=False)  # cells that query in every image
        self.register_buffer("varying_slots", varying, persistent=False)  # whose query cell differs between images
        self.register_buffer("side_weight", side_weight, persistent=False)  # (S,), as `sides` orders them

    def forward(self, squared: Tensor, located: Tensor | None) -> Tensor:
        """Squared feature distances (B, cells of large views, T) and location matches (B, M', 2) -> slots (B, M, 2)."""
        found = []
        if located is not None:
            found += [located[:, t.start : t.start + t.kept].long() for t in self.locations]
        found += [self._nearest(squared, term) for term in self.features]
        return torch.cat(found, dim=1)

    def _nearest(self, squared: Tensor, term: Term) -> Tensor:
        """The `kept` cells of the query view closest to a cell of the candidate view, with those: (B, kept, 2)."""
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
        """The cells whose statistics count, query and candidate sides, each once: (B, S) from the slots (B, M, 2)."""
        fixed = self.fixed_cells.expand(len(slots), -1)
        return torch.cat([fixed, slots[:, self.varying_slots, 0], slots[..., 1]], dim=1)


# ---- The network and its loss ----------------------------------------------------------------------------------------


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(B, P, D) and (B, R, D) -> (B, P, R), from one product: the P x R x D differences never exist.

    Features of an image share most of what they are; without that share the product loses no digits that matter.
    """
    centre = b.mean(1, keepdim=True).detach()
    a, b = a - centre, b - centre
    return (a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None, :]).baddbmm(a, b.mT, alpha=-2)


class _Regularity(torch.autograd.Function):
    """VICReg's variance and covariance terms of many slots, summed by weight: value and gradient in one pass.

    The gradient is known in closed form, so that a slot's n x D features, gathered from the cells, live only while
    their chunk is computed; what stays is one gradient of the size of the cells. 4 n D min(n, D) multiplications a
    slot: with fewer images than channels, the squares of the covariances are summed as those of the n x n Gram matrix.
    """

    @staticmethod
    def forward(ctx: Any, cells: Tensor, rows: Tensor, weight: Tensor, variance: float, covariance: float) -> Tensor:
        """cells (R, D), rows i64 (S, n) of cells, weight (S,) -> (3,): sum, its variance part, its covariance part."""
        n, d = rows.shape[1], cells.shape[1]
        dof = max(n - 1, 1)
        gradient = torch.zeros_like(cells)
        parts = cells.new_zeros(2)
        in_flight = 2**20 if cells.device.type == "cpu" else 2**25  # what a cache holds; what keeps a GPU busy
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
    """SimCLR's loss of each slot, (S,); cells (R, D), rows i64 (S, n, 2) of matched ones. Other images are negative."""
    x = F.normalize(cells[rows.mT.flatten(1)], dim=2)
    images = rows.shape[1]
    logits = x @ x.mT / temperature
    own = torch.eye(2 * images, dtype=torch.bool, device=x.device)
    partner = logits.diagonal(images, 1, 2).sum(1) * 2  # the matrix is symmetric
    return (logits.masked_fill(own, -torch.inf).logsumexp(2).sum(1) - partner) / (2 * images)


def my_slots(cells: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All ranks' cells (n*T, D) in full precision, and this rank's share of the slots: rows of it (s, n, ...), weights.

    From all ranks' cells (n, T, D), the index (n, S, ...) of cells in each slot and weights (S,). The loss is a mean
    over ranks: hence the larger weights.
    """
    share = slice(rank(), None, world_size())
    first = torch.arange(len(cells), device=index.device) * cells.shape[1]
    rows = index[:, share].transpose(0, 1) + first.reshape(-1, *(1,) * (index.ndim - 2))
    return method.fp32(cells).flatten(0, 1), rows, weight[share] * world_size()


def spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean standard deviation over the batch of the L2-normalised features (B, D); mean correlation of two channels.

    0 and 1 say collapse. The sum over all pairs of channels is the square of a sum, so that no D x D matrix is needed.
    """
    x = method.fp32(x.detach())
    std = F.normalize(x, dim=1).std(0, correction=min(len(x) - 1, 1)).mean()
    x = x - x.mean(0)
    x = x / (x.square().mean(0).sqrt() + 1e-5)
    pairs = x.shape[1] * max(x.shape[1] - 1, 1)
    return std, (x.sum(1).square().mean() - x.square().sum(1).mean()) / pairs


class Objective(nn.Module):
    """Both losses and their parts, of embeddings and of cells. A rank computes its share: the mean over ranks counts.

    What the ranks exchange are embeddings, cells and indices: not the slots made of them, ten times as many numbers.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.alpha < 1:
            self.matches = Matches(cfg)

    def global_loss(self, embeddings: Tensor) -> dict[str, Tensor]:
        """VICReg of embeddings (B, N, D): variance and covariance of all views, invariance of the ordered pairs."""
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
        """The loss of matched cells, (B, T, D), by place (B, M', 2) and by features: see `terms` for the weights."""
        z, everyone, matches = method.fp32(cells), gather(cells), self.matches
        squared = squared_distances(z[:, : matches.large], z)
        slots = matches(squared.detach(), located)
        if self.cfg.criterion == "simclr":
            return self.contrastive(everyone, gather(slots.int()), matches.slot_weight.to(z.dtype))
        # One cell of each slot is a large view's, and these come first: the table of distances has them all.
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
    """Linear layers, each but the last followed by a norm and ReLU; the last has no bias (released code)."""

    def __init__(self, width: int, widths: tuple[int, ...], norm: Any) -> None:
        layers: list[nn.Module] = []
        for hidden in widths[:-1]:
            layers += [nn.Linear(width, hidden), norm(hidden), nn.ReLU()]
            width = hidden
        super().__init__(*layers, nn.Linear(width, widths[-1], bias=False))


class Method(method.Method):
    """VICRegL. Batch norm, which ResNet-50 and its heads have, sees the cells of one view at a time (released code)."""

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
        """The maps (B, cells, D) of each view of a kind."""
        pixels = batch.views[kind].pixels
        x = normalise(pixels, self.mean, self.std).unflatten(0, pixels.shape[:2])
        if self.one_by_one:
            return [self.encoder(view) for view in x.unbind(1)]
        return list(self.encoder(x.flatten(0, 1)).unflatten(0, pixels.shape[:2]).unbind(1))

    def on_views(self, head: Head, maps: list[Tensor]) -> Tensor:
        """(B, cells, D) of each view -> (B, T, D'), all views one after another."""
        if self.one_by_one:
            maps = [head(view.flatten(0, 1)).unflatten(0, view.shape[:2]) for view in maps]
            return torch.cat(maps, dim=1)
        return head(torch.cat(maps, dim=1))
