"""Multi-label classification on mean patch features: pooling, the optimum, and sets with known results."""

import numpy as np
import pytest
import torch

from trainer.segmentation import presence
from trainer.segmentation.features import Features


def features(x: list[np.ndarray], shares: list[np.ndarray]) -> Features:
    """Of images with different numbers of patches in a row."""
    counts = np.array([len(part) for part in x])
    whole = (torch.from_numpy(np.concatenate(parts)).half() for parts in (x, shares))
    grids = np.stack([np.ones_like(counts), counts], 1)
    return Features(*whole, torch.zeros(counts.sum(), 6), counts.cumsum() - counts, grids, np.arange(len(x)))  # type: ignore[call-arg]


def scene(g: np.random.Generator, told: bool) -> tuple[np.ndarray, np.ndarray]:
    """3 to 6 patches of some of four classes; features say which, or nothing."""
    n = int(g.integers(3, 7))
    labels = g.choice(g.permutation(4)[: g.integers(1, 4)], n)
    shares = np.eye(5, dtype=np.float32)[labels]  # nothing is of the fifth class
    x = shares[:, :4] * 3 if told else np.zeros((n, 4), np.float32)
    return np.concatenate([x + g.normal(0, 0.1, x.shape), g.normal(0, 1, (n, 3))], 1), shares


def sets(told: bool) -> list[Features]:
    g = np.random.default_rng(0)
    return [features(*map(list, zip(*(scene(g, told) for _ in range(n)), strict=True))) for n in (120, 80)]


def test_an_image_is_the_mean_of_its_patches_and_has_the_classes_of_its_pixels() -> None:
    x = [np.array([[1.0, 2], [3, 4]]), np.array([[5.0, 6]])]
    shares = [np.array([[0.996, 0.004, 0], [1, 0, 0]]), np.array([[0.0, 0, 0]])]
    found = presence.pooled(features(x, shares))
    assert found.x.tolist() == [[2, 3], [5, 6]]
    assert found.present.tolist() == [[True, True, False], [False, False, False]]


def test_the_layer_is_the_minimum() -> None:
    torch.manual_seed(0)
    images = presence.Images(torch.randn(50, 6, dtype=torch.float64), torch.rand(50, 3) < 0.4)
    weight = presence.fit(images, 0.01)
    x = torch.nn.functional.pad(images.x, (0, 1), value=1)
    ridge = torch.full((7, 1), 0.01, dtype=torch.float64)
    ridge[-1] = 0
    gradient = x.T @ ((x @ weight).sigmoid() - images.present.double()) / (50 * 3) + ridge * weight
    assert gradient.abs().max() < 1e-6
    assert weight.abs().max() > 0.1
    assert presence.fit(images, 10.0)[:-1].abs().max() < weight[:-1].abs().max() / 10


def test_what_features_tell_is_found_and_what_they_do_not_is_chance() -> None:
    told, untold = (presence.multilabel(*sets(told)) for told in (True, False))
    assert told["map"] > 97
    share = presence.pooled(sets(False)[1]).present.float().mean(0)[:4].mean().item()
    assert untold["map"] == pytest.approx(100 * share, abs=12)


def test_one_training_image_is_too_few() -> None:
    train, val = sets(True)
    one = train._replace(start=train.start[:1], grids=train.grids[:1], images=train.images[:1])
    with pytest.raises(ValueError, match="one training image is too few"):
        presence.multilabel(one, val)
