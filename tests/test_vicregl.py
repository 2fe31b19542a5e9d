"""VICRegL's losses against published check values and plain loops."""

import numpy as np
import oracles_vicregl as oracle
import pytest
import torch
from torch import Tensor
from vicregl_cases import ALL, TINY, changed, features, located, places, windows

from pipeline.correspondence import pair_matches
from pipeline.windows import from_boxes
from trainer import backbones
from trainer.methods.vicregl import Config, Head, Matches, Objective, spread, squared_distances

# ------------------------------------------------------------------------------------------------ published numbers


def check_vectors() -> tuple[list[Tensor], list[np.ndarray]]:
    """Deterministic features of two 3 x 3 views of four images, and their crops."""
    b, p, c = np.meshgrid(range(4), range(9), range(3), indexing="ij")
    maps = [torch.from_numpy(np.sin(0.7 * b + 1.3 * p + 0.37 * c**2 + phase)) for phase in (0, 1.1)]
    boxes = [[[0, 0, 90, 90]] * 4, [[20 + 3 * i, 31, 70, 50] for i in range(4)]]
    return maps, [from_boxes(np.array(box), np.zeros(4, bool)) for box in boxes]


def close(parts: dict[str, Tensor], expected: list[float], atol: float = 1e-6) -> None:
    got = [float(parts[name].detach()) for name in ("invariance", "variance", "covariance")]
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)
    assert abs(float(parts["loss"].detach()) - sum(expected)) < 3 * atol


def test_check_values_of_the_released_code():
    """What the released functions return for these vectors, coefficients included: the pair, and the global loss."""
    maps, crops = check_vectors()
    # Two views of which the first alone counts as large: one ordered pair.
    cfg = changed(TINY, large=1, small=1, size=48, small_size=48, gamma=(4, 2), feature_gamma=None)
    matches = torch.from_numpy(pair_matches(crops[0][:, None], crops[1][:, None], large_grid=3, gamma=(4, 2)))
    close(Objective(cfg).local_loss(torch.cat(maps, 1), matches), [24.355333, 21.894268, 0.390891])
    pair = changed(TINY, small=0)
    close(Objective(pair).global_loss(torch.stack([m[:, 0] for m in maps], 1)), [13.243544, 11.895885, 0.120124])
    np.testing.assert_allclose(oracle.vic(*maps), [13.678207, 11.414145, 0.143042], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet50", 23_508_032),
        ("convnext_small", 49_441_152),
        ("convnext_base", 87_548_416),
        ("convnext_xlarge", 348_111_872),
    ],
)
def test_parameter_counts(name, count):
    with torch.device("meta"):
        net = backbones.convnet(name)
        heads = {
            "global": Head(net.width, (8192, 8192, 8192), torch.nn.LayerNorm),
            "local": Head(net.width, (512, 512, 512), torch.nn.LayerNorm),
        }
    assert sum(p.numel() for p in net.parameters()) == count
    published = {2048: (151.0, 1.58), 1024: (142.7, 1.05), 768: (140.6, 0.92)}[net.width]
    millions = [sum(p.numel() for p in heads[name].parameters()) / 1e6 for name in ("global", "local")]
    assert [round(millions[0], 1), round(millions[1], 2)] == list(published)


# ------------------------------------------------------------------------------------------------ the loss, by loops


def test_the_two_oracles_agree():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(oracle.vic(x, y), oracle.vic_by_loops(x, y), rtol=1e-12, atol=1e-12)


SHAPES = [
    TINY,
    ALL,
    changed(TINY, feature_gamma=None),
    changed(TINY, gamma=None),
    changed(TINY, small=0),
    changed(ALL, small=0),
    changed(TINY, large=1),
    changed(ALL, large=3, small=1),
    changed(TINY, gamma=(3, 3), feature_gamma=(4, 4)),  # (0, 1) and (1, 0) ask the same: computed once
    changed(TINY, locations=False),
    changed(ALL, features=False),
]


@pytest.mark.parametrize("count", [3, 20], ids=["few_images", "many_images"])
@pytest.mark.parametrize(
    "cfg", SHAPES, ids=lambda c: f"{c.views.large}+{c.views.small}-{c.views.gamma}-{c.feature_gamma}"
)
def test_local_loss_equals_its_formulas(cfg, count):
    """With fewer images than channels and with more, the two ways to a covariance."""
    large, small = windows(count, cfg)
    maps = features(cfg, count, 8)
    ours, theirs = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    parts = Objective(cfg).local_loss(ours, located(cfg, large, small))
    expected = oracle.local_loss(
        theirs.split([g**2 for g in cfg.grids], 1),
        places(cfg, large, small),
        cfg.views.large,
        cfg.views.gamma or (None, None),
        cfg.feature_gamma or (None, None),
        parts=" ".join(name for name in ("features", "locations") if getattr(cfg, name)),
    )
    close(parts, expected.tolist(), atol=1e-6 * float(expected.detach().sum()))
    parts["loss"].backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (1.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 2.0)])
def test_parts_have_their_weights(weights):
    cfg = changed(TINY, invariance=weights[0], variance=weights[1], covariance=weights[2])
    large, small = windows(6, cfg)
    cells, embeddings = features(cfg, 6, 8).requires_grad_(), features(cfg, 6, 8)[:, :4].requires_grad_()
    full, part = Objective(TINY), Objective(cfg)
    for loss, x, args in (
        ("local_loss", cells, (located(cfg, large, small),)),
        ("global_loss", embeddings, ()),
    ):
        one, other = getattr(full, loss)(x, *args), getattr(part, loss)(x, *args)
        expected = [
            float(one[name].detach()) * weight / standard
            for name, weight, standard in zip(
                ("invariance", "variance", "covariance"), weights, (25, 25, 1), strict=True
            )
        ]
        close(other, expected)
        (analytic,) = torch.autograd.grad(other["loss"], x)
        step = 1e-5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
        with torch.no_grad():
            change = getattr(part, loss)(x + step, *args)["loss"] - getattr(part, loss)(x - step, *args)["loss"]
        assert abs(float(change / 2 - (analytic * step).sum())) < 1e-6 * float((analytic * step).abs().sum())


@pytest.mark.parametrize("count", [3, 60])
def test_global_loss_equals_its_formulas(count):
    embeddings = features(TINY, count, 12)[:, :4]
    ours, theirs = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    parts = Objective(TINY).global_loss(ours)
    expected = oracle.global_loss(theirs.unbind(1), 2)
    close(parts, expected.tolist())
    parts["loss"].backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("cfg", [TINY, changed(ALL, small=0)], ids=["top", "all"])
def test_contrastive_losses_equal_their_formulas(cfg):
    cfg = changed(cfg, criterion="simclr", temperature=0.3)
    large, small = windows(3, cfg)
    maps, embeddings = features(cfg, 3, 6), features(cfg, 3, 6, seed=1)[:, : cfg.views.large + cfg.views.small]
    ours = [x.clone().requires_grad_() for x in (maps, embeddings)]
    theirs = [x.clone().requires_grad_() for x in (maps, embeddings)]
    objective = Objective(cfg)
    local = objective.local_loss(ours[0], located(cfg, large, small))
    together = objective.global_loss(ours[1])
    criterion = lambda x, y: oracle.simclr(x, y, 0.3)  # noqa: E731
    gammas = (cfg.views.gamma or (None, None), cfg.feature_gamma or (None, None))
    expected = oracle.local_loss(
        theirs[0].split([g**2 for g in cfg.grids], 1), places(cfg, large, small), 2, *gammas, criterion=criterion
    )
    views = theirs[1].unbind(1)
    pairs = [(i, j) for i in range(2) for j in range(len(views)) if i != j]
    expected_global = sum(criterion(views[i][:, None], views[j][:, None]) for i, j in pairs) / len(pairs)
    for got, wanted in ((local, expected), (together, expected_global)):
        torch.testing.assert_close(got["loss"], wanted, rtol=1e-6, atol=0)
        assert torch.equal(got["contrast"], got["loss"])
    (local["loss"] + together["loss"]).backward()
    (expected + expected_global).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)


def test_distances_without_differences():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 8, generator=generator) + 100, torch.randn(2, 7, 8, generator=generator) + 100
    torch.testing.assert_close(
        squared_distances(a, b), torch.cdist(a.double(), b.double()).square().float(), atol=1e-4, rtol=1e-4
    )


def test_nothing_is_computed_twice():
    """All feature matches of 2 + 6 views: the query sides are the views themselves, (0, 1) and (1, 0) share theirs."""
    published = Matches(Config(feature_gamma=None))
    assert len(published.slot_weight) == 14 * 24 + 2 * 49 + 12 * (49 + 9)
    assert len(published.side_weight) == 2 * 14 * 24 + (2 * 49 + 6 * 9) + 2 * 49 + 12 * (49 + 9)
    assert len(published.side_weight) < 2 * (14 * 24 + 2 * (49 + 49) + 12 * (49 + 9)) * 2 / 3
    for cfg in SHAPES:
        matches, parts = Matches(cfg), cfg.locations + cfg.features
        assert float(matches.slot_weight.sum()) == pytest.approx(parts, rel=1e-5)
        assert float(matches.side_weight.sum()) == pytest.approx(parts, rel=1e-5)


def test_spread_is_what_it_says():
    x = features(TINY, 30, 7)[:, 0]
    std, correlation = spread(x)
    unit = x / x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(std, unit.std(0).mean())  # as the loss has it: over n - 1
    few = spread(x[:2])[0]
    torch.testing.assert_close(few, unit[:2].std(0).mean())
    assert float(spread(x[:1])[0]) == 0
    matrix = np.corrcoef(x.numpy().T)
    assert float(correlation) == pytest.approx((matrix.sum() - 7) / 42, abs=1e-4)
    collapsed = spread(torch.ones(8, 5))
    assert float(collapsed[0]) == 0 and torch.isfinite(collapsed[1])
