"""k-NN against loops, the regression against its definition, and features with known results."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.segmentation import probes
from trainer.segmentation.features import Features
from trainer.segmentation.labelled import VOID, class_shares
from trainer.segmentation.metric import Scores, evaluate
from trainer.segmentation.probes import Neighbours, Regression

PATCH, ROWS, COLUMNS, CLASSES = 8, 6, 9, 4


class Maps:
    """Label maps in memory, in place of a set on disk."""

    def __init__(self, masks: list[Tensor]) -> None:
        self.masks = masks

    def __len__(self) -> int:
        return len(self.masks)

    def mask(self, i: int) -> Tensor:
        return self.masks[i]


def scene(seed: int) -> Tensor:
    """A label map of ROWS x COLUMNS patches: bands of classes 0 to 2, a disc of class 3, an edge of void."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(ROWS * PATCH), torch.arange(COLUMNS * PATCH), indexing="ij")
    a, b, cy, cx, tilt = torch.rand(5, generator=g).tolist()
    line = y + (tilt - 0.5) * 0.6 * x
    labels = (line > 10 + 12 * a).long() + (line > 26 + 10 * b)
    labels[(y - 6 - 36 * cy).square() + (x - 8 - 56 * cx).square() < 150] = 3
    labels[:, :3] = VOID
    return labels.to(torch.uint8)


def features(masks: list[Tensor], make: Callable[[Tensor], Tensor]) -> Features:
    """Features that `make` computes from an image's class shares (patches, C)."""
    shares = [class_shares(mask, ROWS, COLUMNS, CLASSES) for mask in masks]
    x = torch.cat([make(share) for share in shares]).half()
    n = len(masks)
    return Features(
        x,
        torch.cat(shares).half(),
        torch.rand(len(x), 6).half(),
        np.arange(n) * ROWS * COLUMNS,
        np.tile([ROWS, COLUMNS], (n, 1)),
        np.arange(n),
    )


def mix() -> Tensor:
    """A fixed (C, 6) matrix."""
    return torch.randn(CLASSES, 6, generator=torch.Generator().manual_seed(9)) * 2


TRAIN, VAL = [scene(seed) for seed in range(40)], [scene(seed) for seed in range(100, 115)]


def miou(masks: list[Tensor], scores: Scores) -> float:
    return 100 * evaluate(Maps(masks), np.arange(len(masks)), {"": scores}, CLASSES)[""].miou  # type: ignore[arg-type]


def spread(probe: Callable[[Tensor], Tensor], found: Features) -> Scores:
    return lambda j: probe(found.x[found.rows(j)]).mT.unflatten(1, (ROWS, COLUMNS))


def truth(found: Features) -> Scores:
    """True class shares of every patch: the ceiling of the grid."""
    return lambda j: found.shares[found.rows(j)].float().mT.unflatten(1, (ROWS, COLUMNS))


def fitted(train: Features, penalty: float = 1e-7) -> probes.Linear:
    regression = Regression(train.x, train.shares)
    return regression.probe(regression.fit(penalty))


def test_features_that_are_one_hot_labels_reach_the_ceiling_of_the_grid() -> None:
    masks = [mask[4::PATCH, 4::PATCH].repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1) for mask in TRAIN + VAL]
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0][:CLASSES]
    train, val = (features(part, lambda share: 3 * share @ turn) for part in (masks[:40], masks[40:]))
    best = miou(masks[40:], truth(val))
    assert best > 80
    for probe in (fitted(train), Neighbours(train, 10**6)):
        assert miou(masks[40:], spread(probe, val)) == pytest.approx(best, abs=0.1)


def test_features_that_are_positions_reach_the_prior_of_each_patch() -> None:
    train, val = (features(masks, lambda _: torch.eye(ROWS * COLUMNS)) for masks in (TRAIN, VAL))
    frequent = torch.stack([train.shares[train.rows(j)].float() for j in range(len(TRAIN))]).sum(0).mT
    prior = miou(VAL, lambda j: frequent.unflatten(1, (ROWS, COLUMNS)))
    pixels = miou(VAL, lambda j: probes.prior(Maps(TRAIN), CLASSES))  # type: ignore[arg-type]
    assert prior == pytest.approx(pixels, abs=2) and prior > 35
    for probe in (fitted(train), Neighbours(train, 10**6, k=40)):
        assert miou(VAL, spread(probe, val)) == pytest.approx(prior, abs=1)


def test_shuffled_labels_give_the_constant() -> None:
    g = torch.Generator().manual_seed(0)
    sets = [[mask.where(mask != 2, 1) for mask in masks] for masks in (TRAIN, VAL)]  # two thirds are of one class
    train, val = (features(masks, lambda share: torch.randn(len(share), 5, generator=g)) for masks in sets)
    total = train.shares.sum(0)[:, None, None].float()
    assert miou(sets[1], spread(fitted(train), val)) == pytest.approx(miou(sets[1], lambda j: total), abs=0.5)


def test_neighbours_against_loops() -> None:
    g = torch.Generator().manual_seed(1)
    train, val = (
        features(masks, lambda share: share @ mix() + torch.randn(len(share), 6, generator=g))
        for masks in (TRAIN[:3], VAL[:1])
    )
    found = Neighbours(train, 10**6, k=5, temperature=0.1)(val.x)
    for query in (0, 17, 53):
        q = val.x[query].tolist()
        cosines = []
        for x, share in zip(train.x.tolist(), train.shares.tolist(), strict=True):
            if sum(share):  # a patch without a label knows nothing
                cosine = sum(a * b for a, b in zip(q, x, strict=True)) / math.hypot(*q) / math.hypot(*x)
                cosines.append((cosine, [part / sum(share) for part in share]))
        nearest = sorted(cosines, reverse=True)[:5]
        weights = [math.exp(cosine / 0.1) for cosine, _ in nearest]
        votes = [
            sum(w * share[c] for w, (_, share) in zip(weights, nearest, strict=True)) / sum(weights)
            for c in range(CLASSES)
        ]
        assert found[query].tolist() == pytest.approx(votes, abs=2e-3)


def test_the_memory_favours_what_is_rare_in_its_image() -> None:
    train = features(TRAIN, lambda share: torch.randn(len(share), 6))
    everything, some = (Neighbours(train, size).values for size in (10**6, 400))
    again, other = Neighbours(train, 400), Neighbours(train, 400, seed=1)
    assert len(some) == 400 and torch.equal(again.values, some) and not torch.equal(other.keys, again.keys)
    assert some[:, 3].mean() > 1.25 * everything[:, 3].mean() > 0.05
    assert (some.sum(1) - 1).abs().max() < 1e-3


def test_the_regression_finds_the_minimum_of_its_definition() -> None:
    train = features(TRAIN[:6], lambda share: share @ mix() + torch.randn(len(share), 6) + 5)
    void = torch.arange(len(train.x)) % 7 == 0
    regression = Regression(train.x, train.shares, without=void)
    weight = regression.fit(1e-2)

    x, shares = train.x[~void].double(), train.shares[~void].double()
    mean = (shares.sum(1) @ x) / shares.sum()
    std = ((shares.sum(1) @ (x - mean).square()) / shares.sum()).sqrt()
    free = weight.clone(memory_format=torch.contiguous_format).requires_grad_()

    def loss(parameters: Tensor) -> Tensor:
        logits = (x - mean) / std @ parameters[:-1] + parameters[-1]
        cross_entropy = -(shares * logits.log_softmax(1)).sum() / shares.sum()
        return cross_entropy + 0.005 * parameters[:-1].square().sum()

    loss(free).backward()
    assert free.grad.abs().max() < 1e-3
    optimizer = torch.optim.LBFGS([free], max_iter=1000, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss(free).backward()
        return loss(free)

    optimizer.step(closure)
    assert loss(free) < loss(weight) < loss(free) + 5e-5 < loss(torch.zeros_like(weight)) - 0.3
    again = regression.fit(1e-2, torch.randn_like(weight))
    free_shift = (again[-1] - weight[-1]).mean()  # one number added to all biases changes nothing
    again[-1] -= free_shift
    torch.testing.assert_close(again, weight, atol=0.02, rtol=0)
    logits = (train.x.double() - mean) / std @ weight[:-1] + weight[-1]
    torch.testing.assert_close(regression.probe(weight)(train.x).double(), logits, atol=1e-3, rtol=1e-3)


def test_the_regression_reads_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    train = features(TRAIN[:4], lambda share: share @ mix() + 1)
    whole = fitted(train, 1e-3)(train.x).softmax(1)
    monkeypatch.setattr(probes, "CHUNK", {"cpu": 37 * 6})
    torch.testing.assert_close(fitted(train, 1e-3)(train.x).softmax(1), whole, atol=1e-3, rtol=0)


def test_the_regression_that_is_not_at_its_minimum_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "ITERATIONS", 2)
    train = features(TRAIN[:4], lambda share: share @ mix())
    with pytest.warns(UserWarning, match="before its minimum"):
        Regression(train.x, train.shares).fit(1e-6)


def test_nothing_labelled_is_refused() -> None:
    with pytest.raises(ValueError, match="no labelled pixel"):
        Regression(torch.randn(10, 3).half(), torch.zeros(10, 4).half())


def test_surroundings_are_colours_and_places() -> None:
    found = features(TRAIN[:2], lambda share: share)
    table = probes.surroundings(found)
    assert table.shape == (2 * ROWS * COLUMNS, 11) and torch.equal(table[:, :6], found.colour)
    corner = table[ROWS * COLUMNS + COLUMNS - 1, 6:]  # of the second image: above, at the right
    assert corner.tolist() == [-1, 1, 1, 1, -1]


def test_neighbours_need_a_labelled_patch() -> None:
    train = features(TRAIN[:1], lambda share: share)
    with pytest.raises(ValueError, match="no labelled pixel"):
        Neighbours(train._replace(shares=torch.zeros_like(train.shares)), 10)
