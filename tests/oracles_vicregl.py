"""Reference implementation of VICRegL's loss, one pair of views after another: slow, obvious, differentiable.

There are two forms of the criterion. `vic` computes all slots of a pair at once, as a direct transcription.
`vic_by_loops` loops over slots and channels. A map is (n, P, D), a grid of places (n, P, 2), for P cells of n images.
"""

import torch
from torch import Tensor

INVARIANCE, VARIANCE, COVARIANCE = 25.0, 25.0, 1.0


def vic(x: Tensor, y: Tensor) -> Tensor:
    """Matched maps (n, K, D) twice -> (invariance, variance, covariance), statistics over n in each slot."""

    def variance(z: Tensor) -> Tensor:
        return (1 - (z.var(0) + 1e-4).sqrt()).relu().mean()

    def covariance(z: Tensor) -> Tensor:
        n, _, d = z.shape
        z = z - z.mean(0)
        cov = torch.einsum("nkc,nkd->kcd", z, z) / (n - 1)
        off = cov.flatten(1)[:, :-1].unflatten(1, (d - 1, d + 1))[:, :, 1:] if d > 1 else cov[:, :0]
        return off.square().sum((1, 2)).mean() / d

    return torch.stack(
        [
            INVARIANCE * (x - y).square().mean(),
            VARIANCE * (variance(x) + variance(y)) / 2,
            COVARIANCE * (covariance(x) + covariance(y)) / 2,
        ]
    )


def vic_by_loops(x: Tensor, y: Tensor) -> Tensor:
    n, slots, d = x.shape
    parts = x.new_zeros(3)
    for k in range(slots):
        for z in (x[:, k], y[:, k]):
            mean = sum(z[b] for b in range(n)) / n
            hinge, off_diagonal = 0, 0
            for c in range(d):
                for e in range(d):
                    cov = sum((z[b, c] - mean[c]) * (z[b, e] - mean[e]) for b in range(n)) / (n - 1)
                    if c == e:
                        hinge = hinge + torch.clamp(1 - torch.sqrt(cov + 1e-4), min=0)
                    else:
                        off_diagonal = off_diagonal + cov**2
            parts = parts + torch.stack([x.new_zeros(()), VARIANCE * hinge / d, COVARIANCE * off_diagonal / d]) / 2
        squared = sum((x[b, k, c] - y[b, k, c]) ** 2 for b in range(n) for c in range(d))
        parts = parts + torch.stack([INVARIANCE * squared / (n * d), x.new_zeros(()), x.new_zeros(())])
    return parts / slots


def matched(a: Tensor, b: Tensor, where_a: Tensor, where_b: Tensor, top: int | None) -> tuple[Tensor, Tensor]:
    """The cells of `a` nearest to one of `b`, in ascending order, and those: two maps (n, top, D)."""
    distance = (where_a[:, :, None] - where_b[:, None]).square().sum(3)
    least, nearest = distance.min(2)
    cells = least.argsort(dim=1, stable=True)[:, : top or least.shape[1]].sort(1).values
    index = cells[..., None].expand(-1, -1, a.shape[2])
    partner = nearest.gather(1, cells)[..., None].expand(-1, -1, b.shape[2])
    return a.gather(1, index), b.gather(1, partner)


def pair(
    i: int,
    j: int,
    maps: list[Tensor],
    places: list[Tensor],
    gamma: tuple[int | None, int | None],
    feature_gamma: tuple[int | None, int | None],
    criterion=vic,
    parts: str = "features and locations",
) -> Tensor:
    """Half of each direction's feature matching and half of its location matching."""
    total = 0
    for (a, b), g, f in zip(((i, j), (j, i)), gamma, feature_gamma, strict=True):
        if "features" in parts:
            total = total + 0.5 * criterion(*matched(maps[a], maps[b], maps[a].detach(), maps[b].detach(), f))
        if "locations" in parts:
            total = total + 0.5 * criterion(*matched(maps[a], maps[b], places[a], places[b], g))
    return total


def local_loss(maps, places, large, gamma, feature_gamma, **options) -> Tensor:
    """The mean over the ordered pairs (i, j), i a large view."""
    pairs = [(i, j) for i in range(large) for j in range(len(maps)) if j != i]
    return sum(pair(i, j, maps, places, gamma, feature_gamma, **options) for i, j in pairs) / len(pairs)


def global_loss(embeddings: list[Tensor], large: int, criterion=vic) -> Tensor:
    """VICReg of (n, D) of each view: invariance of the ordered pairs, variance and covariance of every view."""
    pairs = [(i, j) for i in range(large) for j in range(len(embeddings)) if j != i]
    invariance = sum(criterion(embeddings[i][:, None], embeddings[j][:, None])[0] for i, j in pairs) / len(pairs)
    rest = sum(criterion(e[:, None], e[:, None])[1:] for e in embeddings) / len(embeddings)
    return torch.cat([invariance[None], rest])


def simclr(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss of matched maps (n, K, D), mean over slots: each vector finds its partner among all but itself."""
    n, slots, _ = x.shape
    total = x.new_zeros(())
    for k in range(slots):
        z = [v / v.norm() for v in (*x[:, k], *y[:, k])]
        for a in range(2 * n):
            others = torch.stack([z[a] @ z[b] / temperature for b in range(2 * n) if b != a])
            total = total + others.logsumexp(0) - z[a] @ z[(a + n) % (2 * n)] / temperature
    return total / (2 * n * slots)
