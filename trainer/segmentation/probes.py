"""Probes that classify frozen patch features: nearest neighbours, logistic regression, and floors without a network.

A probe maps features (p, D) to scores (p, C), f32. No probe has a learning rate: k-NN is not fitted, and the regression
is convex, with one minimum.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.segmentation.features import Features
from trainer.segmentation.labelled import Labelled, class_shares
from trainer.segmentation.metric import Scores

PENALTIES = tuple(10.0**e for e in range(-1, -8, -1))
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}  # numbers per chunk: fits a CPU's cache; keeps a GPU busy
HESSIAN = 1 << 15  # approximate number of patches used for the Hessian
ITERATIONS = 300


class Neighbours:
    """Soft-label k-NN after Hummingbird (Balazevic et al., arXiv 2306.01667) among `memory` patches of a training set.

    Each of the `k` nearest patches by cosine similarity s contributes its class shares with weight
    softmax(s / temperature). Every image gives equally many patches to the memory, drawn with `seed`: those with the
    lowest ``count * uniform``, where `count` is, summed over the classes of a patch, the number of patches of the image
    with that class. This favours classes that are rare in an image.
    """

    def __init__(
        self,
        train: Features,
        memory: int,
        *,
        k: int = 30,
        temperature: float = 0.02,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        each = max(1, memory // len(train.images))
        chosen = []
        for j in range(len(train.images)):
            shares = train.shares[train.rows(j)]
            occurs = (shares > 0).float()
            score = (occurs @ occurs.sum(0)) * torch.rand(len(shares), generator=generator)
            best = torch.where(occurs.any(1), score, torch.inf).argsort()[:each]
            chosen.append(train.start[j] + best[occurs[best].any(1)])
        index = torch.cat(chosen).sort().values
        if not len(index):
            raise ValueError("the training images have no labelled pixel")
        self.k, self.temperature = min(k, len(index)), temperature
        self.keys = F.normalize(train.x[index].to(device).float())
        self.values = F.normalize(train.shares[index].to(device).float(), p=1)

    def __call__(self, x: Tensor) -> Tensor:
        found = []
        for part in F.normalize(x.to(self.keys.device).float()).split(max(1, (1 << 26) // len(self.keys))):
            nearest, index = (part @ self.keys.T).topk(self.k)
            weight = (nearest / self.temperature).softmax(1)
            found.append(torch.bmm(weight[:, None], self.values[index])[:, 0])
        return torch.cat(found)


@dataclass(frozen=True)
class Linear:
    """A linear layer that maps unstandardised features to logits."""

    weight: Tensor  # f32 (D, C)
    bias: Tensor  # f32 (C,)

    def __call__(self, x: Tensor) -> Tensor:
        return x.to(self.weight.device).float() @ self.weight + self.bias


class Regression:
    """Multinomial logistic regression of class shares on standardised features, with an L2 penalty on the weights.

    The loss is the mean cross-entropy over labelled pixels, where all pixels of a patch get its prediction. It is
    convex. L-BFGS minimises it until a step lowers it by less than 1e-6, about 1e-5 above the minimum. The weights of
    each class are preconditioned with its block of the initial Hessian: some 30 evaluations instead of 300.

    `x` (P, D) and `shares` (P, C) may be memory-mapped; they are read in chunks. `without`, bool (P,), marks patches
    to ignore.
    """

    def __init__(self, x: Tensor, shares: Tensor, *, without: Tensor | None = None, device: str = "cpu") -> None:
        self.x, self.shares, self.without, self.device = x, shares, without, device
        self.step = max(1, CHUNK[torch.device(device).type] // x.shape[1])
        self.mean, self.std = torch.zeros(x.shape[1], device=device), torch.ones(x.shape[1], device=device)
        total, first, second = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
        for rows, target in self._chunks():
            weight, values = target.sum(1).double(), rows.double()
            total, first, second = total + weight.sum(), first + weight @ values, second + weight @ values.square()
        if not total:
            raise ValueError("the training images have no labelled pixel")
        self.total, mean = total, first / total
        self.mean, self.std = mean.float(), (second / total - mean.square()).clamp(min=0).sqrt().float() + 1e-5

    def _chunks(self, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield standardised features, f32 (p, D), and class shares, f32 (p, C), of every `every`-th patch."""
        for first in range(0, len(self.x), self.step * every):
            part = slice(first, first + self.step * every, every)
            x, target = (whole[part].to(self.device).float() for whole in (self.x, self.shares))
            if self.without is not None:
                target[self.without[part]] = 0
            yield (x - self.mean) / self.std, target

    def loss(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss without penalty at `weight`, f64 (D + 1, C) with the bias last, and its gradient."""
        loss, gradient = torch.zeros((), dtype=torch.float64, device=self.device), torch.zeros_like(weight)
        w = weight.float()
        for rows, target in self._chunks():
            log_p = torch.addmm(w[-1], rows, w[:-1]).log_softmax(1)
            loss -= (target * log_p).sum()
            error = log_p.exp() * target.sum(1, keepdim=True) - target
            gradient += torch.cat([rows.mT @ error, error.sum(0, keepdim=True)])
        return loss / self.total, gradient / self.total

    def hessian(self, weight: Tensor) -> Tensor:
        """Return the Hessian blocks f64 (C, D + 1, D + 1), one per class, estimated from a subset of the patches."""
        blocks = torch.zeros(weight.shape[1], *(len(weight),) * 2, dtype=torch.float64, device=self.device)
        every, total = -(-len(self.x) // HESSIAN), 0.0
        for rows, target in self._chunks(every):
            x = F.pad(rows, (0, 1), value=1)
            p = (x @ weight.float()).softmax(1)
            spread = p * (1 - p) * target.sum(1, keepdim=True)
            for c in range(len(blocks)):
                blocks[c] += (x * spread[:, c, None]).mT @ x
            total += target.sum().item()
        return blocks / max(total, 1e-9)

    def fit(self, penalty: float, start: Tensor | None = None) -> Tensor:
        """Minimise ``loss + penalty / 2 * |weights|^2``, starting from `start` or 0. Return f64 (D + 1, C)."""
        if start is None:
            start = torch.zeros(self.x.shape[1] + 1, self.shares.shape[1], dtype=torch.float64, device=self.device)
        ridge = torch.full_like(start[:, :1], penalty)
        ridge[-1] = 0
        root = torch.linalg.cholesky(self.hessian(start) + torch.diag(ridge[:, 0] + 1e-6))  # (C, D + 1, D + 1)
        turned = (root.mT @ start.T[:, :, None]).requires_grad_()

        def weights() -> Tensor:
            return torch.linalg.solve_triangular(root.mT, turned.detach(), upper=True)[:, :, 0].T

        @torch.no_grad()
        def closure() -> Tensor:
            weight = weights()
            loss, gradient = self.loss(weight)
            gradient = (gradient + ridge * weight).T[:, :, None].contiguous()
            turned.grad = torch.linalg.solve_triangular(root, gradient, upper=False).contiguous()
            return loss + (ridge * weight.square()).sum() / 2

        optimizer = torch.optim.LBFGS(
            [turned],
            max_iter=ITERATIONS,
            max_eval=10 * ITERATIONS,
            tolerance_grad=1e-6,
            tolerance_change=1e-6,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(closure)
        if optimizer.state[turned]["n_iter"] == ITERATIONS:
            warnings.warn(f"logistic regression stopped after {ITERATIONS} iterations before its minimum", stacklevel=2)
        return weights()

    def probe(self, weight: Tensor) -> Linear:
        """Return the probe with weights `weight`, for features that are not standardised."""
        scaled = weight[:-1].float() / self.std[:, None]
        return Linear(scaled, weight[-1].float() - self.mean @ scaled)


def resident(train: Features, device: str) -> Features:
    """Move features to the GPU if they fit in 80 % of its free memory. A regression reads them about 100 times."""
    if torch.device(device).type != "cuda":
        return train
    fits = train.x.nbytes + train.shares.nbytes < 0.8 * torch.cuda.mem_get_info(device)[0]
    return train._replace(x=train.x.to(device), shares=train.shares.to(device)) if fits else train


def surroundings(features: Features) -> Tensor:
    """Return features that need no network, f16 (P, 11): each patch's colours, and its position up to second order."""
    places = []
    for rows, columns in features.grids.tolist():
        y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
        places.append(torch.stack([y, x, y * y, x * x, y * x], -1).flatten(0, 1))
    return torch.cat([features.colour, torch.cat(places).half()], 1)


def prior(data: Labelled, classes: int, side: int = 128) -> Tensor:
    """Return the frequency of each class at each position, over images stretched to a square: f32 (C, side, side)."""
    total = torch.zeros(side * side, classes)
    for i in range(len(data)):
        total += class_shares(data.mask(i), side, side, classes)
    return total.mT.unflatten(1, (side, side))


def scores(probe: Callable[[Tensor], Tensor], features: Features, x: Tensor) -> Scores:
    """Return a function from j to the j-th image's scores (C, rows, columns), given features `x` (P, ...)."""
    return lambda j: probe(x[features.rows(j)]).mT.unflatten(1, features.grids[j].tolist())
