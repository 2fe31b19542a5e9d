"""VICRegL against published check values, loop-written formulas, other numbers of ranks, and its own edges."""

import os
import socket
from dataclasses import replace

import numpy as np
import oracles_vicregl as oracle
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from pipeline import Batch, recipes
from pipeline.batch import View
from pipeline.correspondence import feature_locations, pair_matches
from pipeline.windows import from_boxes
from trainer import backbones
from trainer.lars import LARS
from trainer.methods import vicregl
from trainer.methods.vicregl import Config, Head, Matches, Method, Objective, spread, squared_distances

# 4 x 4 cells in a large view, 2 x 2 in a small one: 16 and 4.
TINY = Config(
    backbone="vit_nano_patch16",
    drop_path=0.0,
    size=64,
    small=2,
    small_size=32,
    gamma=(5, 2),
    feature_gamma=(5, 2),
    expander=(24, 24, 40),
    projector=(16, 16, 12),
)
ALL = replace(TINY, gamma=None, feature_gamma=None)
CONV = replace(TINY, backbone="convnext_small", gamma=(3, 1), feature_gamma=(3, 1))  # 2 x 2 cells, and one


def windows(count: int, cfg: Config, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    h, w = rng.integers(40, 200, (2, count, cfg.large + cfg.small))
    y, x = rng.integers(0, 100, (2, count, cfg.large + cfg.small))
    drawn = from_boxes(np.stack([y, x, h, w], -1), rng.random(h.shape) < 0.5)
    return np.split(drawn, [cfg.large], axis=1)


def places(cfg: Config, large: np.ndarray, small: np.ndarray) -> list[Tensor]:
    views = [*large.swapaxes(0, 1), *small.swapaxes(0, 1)]
    return [torch.from_numpy(feature_locations(w, g)).double() for w, g in zip(views, cfg.grids, strict=True)]


def located(cfg: Config, large: np.ndarray, small: np.ndarray) -> Tensor:
    grids = {"large_grid": cfg.grids[0], "small_grid": cfg.grids[-1]}
    return torch.from_numpy(pair_matches(large, small, **grids, gamma=cfg.gamma))


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
    for kind, size, w in (("large", cfg.size, large), ("small", cfg.small_size, small)):
        if w.shape[1]:
            pixels = torch.randint(0, 256, (*w.shape[:2], size, size, 3), generator=generator, dtype=torch.uint8)
            views[kind] = View(pixels, torch.from_numpy(w))
    targets = {"matches": located(cfg, large, small)} if cfg.locations and cfg.alpha < 1 else {}
    return Batch(views, targets, torch.full((count,), -1), torch.arange(count))


def build(cfg: Config, seed: int = 0) -> Method:
    torch.manual_seed(seed)
    return Method(cfg).double()


ZERO = torch.zeros((), dtype=torch.float64)


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
    cfg = replace(TINY, large=1, small=1, size=48, small_size=48, gamma=(4, 2), feature_gamma=None)
    matches = torch.from_numpy(pair_matches(crops[0][:, None], crops[1][:, None], large_grid=3, gamma=(4, 2)))
    close(Objective(cfg).local_loss(torch.cat(maps, 1), matches), [24.355333, 21.894268, 0.390891])
    pair = replace(TINY, small=0)
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
    replace(TINY, feature_gamma=None),
    replace(TINY, gamma=None),
    replace(TINY, small=0),
    replace(ALL, small=0),
    replace(TINY, large=1),
    replace(ALL, large=3, small=1),
    replace(TINY, gamma=(3, 3), feature_gamma=(4, 4)),  # (0, 1) and (1, 0) ask the same: computed once
    replace(TINY, locations=False),
    replace(ALL, features=False),
]


@pytest.mark.parametrize("count", [3, 20], ids=["few_images", "many_images"])
@pytest.mark.parametrize("cfg", SHAPES, ids=lambda c: f"{c.large}+{c.small}-{c.gamma}-{c.feature_gamma}")
def test_local_loss_equals_its_formulas(cfg, count):
    """With fewer images than channels and with more, the two ways to a covariance."""
    large, small = windows(count, cfg)
    maps = features(cfg, count, 8)
    ours, theirs = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    parts = Objective(cfg).local_loss(ours, located(cfg, large, small))
    expected = oracle.local_loss(
        theirs.split([g**2 for g in cfg.grids], 1),
        places(cfg, large, small),
        cfg.large,
        cfg.gamma or (None, None),
        cfg.feature_gamma or (None, None),
        parts=" ".join(name for name in ("features", "locations") if getattr(cfg, name)),
    )
    close(parts, expected.tolist(), atol=1e-6 * float(expected.detach().sum()))
    parts["loss"].backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (1.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 2.0)])
def test_parts_have_their_weights(weights):
    cfg = replace(TINY, invariance=weights[0], variance=weights[1], covariance=weights[2])
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


@pytest.mark.parametrize("cfg", [TINY, replace(ALL, small=0)], ids=["top", "all"])
def test_contrastive_losses_equal_their_formulas(cfg):
    cfg = replace(cfg, criterion="simclr", temperature=0.3)
    large, small = windows(3, cfg)
    maps, embeddings = features(cfg, 3, 6), features(cfg, 3, 6, seed=1)[:, : cfg.large + cfg.small]
    ours = [x.clone().requires_grad_() for x in (maps, embeddings)]
    theirs = [x.clone().requires_grad_() for x in (maps, embeddings)]
    objective = Objective(cfg)
    local = objective.local_loss(ours[0], located(cfg, large, small))
    together = objective.global_loss(ours[1])
    criterion = lambda x, y: oracle.simclr(x, y, 0.3)  # noqa: E731
    gammas = (cfg.gamma or (None, None), cfg.feature_gamma or (None, None))
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
    published = Matches(replace(Config(), feature_gamma=None))
    assert len(published.weight) == 14 * 24 + 2 * 49 + 12 * (49 + 9)
    assert len(published.side_weight) == 2 * 14 * 24 + (2 * 49 + 6 * 9) + 2 * 49 + 12 * (49 + 9)
    assert len(published.side_weight) < 2 * (14 * 24 + 2 * (49 + 49) + 12 * (49 + 9)) * 2 / 3
    for cfg in SHAPES:
        matches, parts = Matches(cfg), cfg.locations + cfg.features
        assert float(matches.weight.sum()) == pytest.approx(parts, rel=1e-5)
        assert float(matches.side_weight.sum()) == pytest.approx(parts, rel=1e-5)


# ------------------------------------------------------------------------------------------------ the method


def naive_step(method: Method, batch: Batch) -> Tensor:
    """Every view through backbone and heads on its own, then the formulas."""
    cfg, recipe = method.cfg, vicregl.views(method.cfg)
    maps, embeddings = [], []
    for kind in batch.views:
        for v in range(batch.views[kind].pixels.shape[1]):
            x = batch.views[kind].pixels[:, v].permute(0, 3, 1, 2).float() / 255
            x = (x - torch.tensor(recipe.mean)[:, None, None]) / torch.tensor(recipe.std)[:, None, None]
            cells = method.encoder(x)
            embeddings.append(method.expander(cells.mean(1)))
            maps.append(method.projector(cells.flatten(0, 1)).unflatten(0, cells.shape[:2]))
    where = places(cfg, batch.views["large"].window.numpy(), batch.views["small"].window.numpy())
    local = oracle.local_loss(maps, where, cfg.large, cfg.gamma, cfg.feature_gamma).sum()
    return cfg.alpha * oracle.global_loss(embeddings, cfg.large).sum() + (1 - cfg.alpha) * local


class NarrowResNet(backbones.ResNet):
    def __init__(self) -> None:
        options = {"num_classes": 0, "norm_layer": backbones.BatchNorm, "channels": (8, 8, 16, 16)}
        timm.models.resnet.ResNet.__init__(self, timm.models.resnet.Bottleneck, (1, 1, 1, 1), **options)
        self.width = self.num_features


def small_resnet(name: str, **_) -> torch.nn.Module:
    return NarrowResNet()


def small_convnext(name: str, *, drop_path: float) -> torch.nn.Module:
    return backbones.ConvNeXt((1, 1, 1, 1), (8, 16, 24, 32), drop_path=drop_path)


@pytest.mark.parametrize("name", ["vit_nano_patch16", "resnet50", "convnext_small"])
def test_a_step_equals_views_one_by_one(name, monkeypatch):
    monkeypatch.setattr(vicregl, "convnet", small_resnet if name == "resnet50" else small_convnext)
    cfg = TINY if name == TINY.backbone else replace(CONV, backbone=name)
    method, batch = build(cfg), batch_of(cfg, 4)
    expected = naive_step(method, batch)
    expected_gradient = torch.autograd.grad(expected, list(method.parameters()))
    loss, metrics = method(batch, ZERO)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for p, mine, theirs in zip(
        method.parameters(), torch.autograd.grad(loss, list(method.parameters())), expected_gradient, strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max() + 1e-3)), p.shape
    assert all(m.ndim == 0 and not m.requires_grad for m in metrics.values())
    summed = {
        p: sum(float(metrics[f"{p}_{q}"]) for q in ("invariance", "variance", "covariance"))
        for p in ("global", "local")
    }
    assert 0.75 * summed["global"] + 0.25 * summed["local"] == pytest.approx(float(loss))


def test_every_view_gets_a_gradient():
    method = build(TINY)
    cells = features(TINY, 4, 12).requires_grad_()
    large, small = windows(4, TINY)
    method.objective.local_loss(cells, located(TINY, large, small))["loss"].backward()
    for view in cells.grad.split([16, 16, 4, 4], 1):
        assert (view.abs().sum((1, 2)) > 0).all()


def test_alpha_decides_which_heads_exist(monkeypatch):
    monkeypatch.setattr(vicregl, "convnet", small_convnext)
    names = {alpha: dict(build(replace(CONV, alpha=alpha)).named_children()) for alpha in (0.0, 0.75, 1.0)}
    assert "expander" not in names[0.0] and "projector" in names[0.0]
    assert "projector" not in names[1.0] and "expander" in names[1.0]
    for alpha, part in ((0.0, "local"), (1.0, "global")):
        cfg = replace(CONV, alpha=alpha)
        loss, metrics = build(cfg)(batch_of(cfg, 4), ZERO)
        assert {name.partition("_")[0] for name in metrics} <= {part, "feature", "embedding"}
        summed = sum(float(metrics[f"{part}_{name}"]) for name in ("invariance", "variance", "covariance"))
        assert float(loss) == pytest.approx(summed)


def test_weights_keep_timms_names():
    with torch.device("meta"):
        for name in ("convnext_tiny", "resnet50"):
            theirs = [k for k in timm.create_model(name, num_classes=0).state_dict() if not k.endswith(".gamma")]
            assert list(backbones.convnet(name).state_dict()) == theirs  # all but the layer scale


def test_convnext_norms_every_cell_before_the_mean():
    net = small_convnext("", drop_path=0.0)
    with torch.no_grad():
        net.head.norm.weight.uniform_(0.5, 2)
        net.head.norm.bias.uniform_(-1, 1)
        cells = net(torch.randn(2, 3, 64, 96))
        maps = net.forward_features(torch.zeros(2, 3, 64, 96))
    assert cells.shape == (2, 2 * 3, 32) and maps.shape == (2, 32, 2, 3)
    plain = (cells - net.head.norm.bias) / net.head.norm.weight
    torch.testing.assert_close(plain.mean(2), torch.zeros(2, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(plain.var(2, correction=0), torch.ones(2, 6), atol=1e-2, rtol=0)


def test_cells_are_row_by_row():
    x = torch.randn(2, 3, 96, 128)
    for net in (small_convnext("", drop_path=0.0), small_resnet("").eval()):
        with torch.no_grad():
            cells, maps = net(x), net.forward_features(x)
        for row in range(3):
            for column in range(4):
                cell = maps[..., row, column]
                if hasattr(net, "stem"):
                    cell = torch.nn.functional.layer_norm(cell, cell.shape[1:], eps=1e-6)
                torch.testing.assert_close(cells[:, row * 4 + column], cell)


def test_groups_decay_matrices_only():
    method = build(TINY)
    decayed, free = method.parameter_groups(0.05)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(method.parameters()))
    assert method.backbone() is method.encoder


def test_views_ask_for_what_the_config_says():
    recipe = vicregl.views(TINY)
    assert [(c.kind, c.count, c.size, c.grid) for c in recipe.cuts] == [("large", 2, 64, 4), ("small", 2, 32, 2)]
    large, small = windows(3, TINY)
    targets = recipe.targets({"large": large, "small": small})
    assert (targets["matches"] == located(TINY, large, small).numpy()).all()
    assert vicregl.views(replace(TINY, alpha=1.0)).targets is None
    assert vicregl.views(replace(TINY, locations=False)).targets is None
    released = vicregl.views(replace(TINY, fidelity="released"))
    assert released.std[0] == 0.228 and vicregl.views(TINY).std == recipes.IMAGENET_STD
    assert (released.targets({"large": large, "small": small})["matches"] != targets["matches"]).any()
    alone = vicregl.views(Config(backbone="resnet50", small=0, large_scale=(0.08, 1.0)))
    assert [(c.kind, c.grid, c.scale) for c in alone.cuts] == [("large", 7, (0.08, 1.0))]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"large": 1, "small": 0}, "a large view and another one are needed"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"locations": False, "features": False}, "both off"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"small_size": 40}, "small_size is 40: vit_nano_patch16 needs a multiple of 16"),
        ({"gamma": (17, 2)}, "gamma is (17, 2): at most 16 and 4 cells"),
        ({"feature_gamma": (5, 5)}, "feature_gamma is (5, 5)"),
        ({"gamma": (0, 1)}, "gamma is (0, 1)"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError) as caught:
        replace(TINY, **wrong)
    assert message in str(caught.value)


def test_an_unknown_backbone_is_named():
    with pytest.raises(ValueError, match="unknown backbone 'convnext_huge'"):
        backbones.convnet("convnext_huge")


# ------------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("criterion", ["vicreg", "simclr"])
@pytest.mark.parametrize("count", [1, 3])
def test_loss_stays_finite_where_nothing_varies(count, criterion):
    cfg = replace(TINY, criterion=criterion)
    large, small = windows(count, cfg)
    large[:], small[:] = large[:1, :1], large[:1, :1]  # identical views
    for value in (0.0, 1e4):
        cells = torch.full((count, 40, 12), value, requires_grad=True)
        objective = Objective(cfg)
        loss = objective.local_loss(cells, located(cfg, large, small))["loss"]
        loss = loss + objective.global_loss(cells[:, :4])["loss"]
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(cells.grad).all()
    if criterion == "vicreg":  # collapse: every hinge is at its height, of the whole, by place and by features
        assert float(loss.detach()) == pytest.approx(3 * 25 * 0.99, rel=1e-3)


def test_statistics_are_float32_under_autocast(monkeypatch):
    monkeypatch.setattr(vicregl, "convnet", small_convnext)
    method, batch = build(CONV).float(), batch_of(CONV, 6)
    exact, _ = method(batch, torch.zeros(()))
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = method(batch, torch.zeros(()))
    loss.backward()
    assert loss.dtype == torch.float32 and all(m.dtype == torch.float32 for m in metrics.values())
    assert float(loss) == pytest.approx(float(exact), rel=0.05)
    cells = features(TINY, 6, 12).bfloat16()
    parts = Objective(TINY).global_loss(cells[:, :4])
    again = Objective(TINY).global_loss(cells[:, :4].double())
    assert float(parts["covariance"]) == pytest.approx(float(again["covariance"]), rel=1e-5)


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


def test_one_graph(monkeypatch):
    """No break, no recompilation from step to step."""
    monkeypatch.setattr(vicregl, "convnet", small_convnext)
    cfg = CONV
    torch.manual_seed(0)
    method = Method(cfg)
    expected = method(batch_of(cfg, 4), torch.zeros(()))[0]
    torch._dynamo.reset()
    step = torch.compile(method, backend="eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = [step(batch_of(cfg, 4, seed), torch.tensor(0.1 * seed))[0] for seed in range(2)]
    torch.testing.assert_close(losses[0], expected)
    losses[1].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())


@pytest.mark.parametrize("criterion", ["vicreg", "simclr"])
def test_losses_compile_with_their_gradients(criterion):
    objective = Objective(replace(TINY, criterion=criterion))
    cells, matches = features(TINY, 3, 6).requires_grad_(), located(TINY, *windows(3, TINY))

    def losses(cells, matches):
        return objective.local_loss(cells, matches)["loss"] + objective.global_loss(cells[:, :4])["loss"]

    torch._dynamo.reset()
    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True, dynamic=False)
    values = [f(cells, matches) for f in (compiled, losses)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(v, cells)[0] for v in values))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_nano_patch16", "resnet50", "convnext_small"])
def test_compiled_step_is_the_same_step(name, monkeypatch):
    monkeypatch.setattr(vicregl, "convnet", small_resnet if name == "resnet50" else small_convnext)
    cfg = replace(TINY, backbone=name, size=96, small_size=64)
    torch.manual_seed(0)
    method, batch = Method(cfg), batch_of(cfg, 4)
    loss, metrics = method(batch, torch.zeros(()))
    expected = torch.autograd.grad(loss, list(method.parameters()))
    torch._dynamo.reset()
    method.compile(fullgraph=True, dynamic=False)
    compiled, parts = method(batch, torch.zeros(()))
    torch.testing.assert_close(compiled, loss, rtol=1e-4, atol=0)
    assert parts.keys() == metrics.keys()
    for a, b in zip(torch.autograd.grad(compiled, list(method.parameters())), expected, strict=True):
        assert float((a - b).norm()) < 2e-2 * float(b.norm()) + 1e-3


# ------------------------------------------------------------------------------------------------ ranks


RANKS = {
    "layer_norm": CONV,
    "all": replace(CONV, gamma=None, feature_gamma=None),
    "simclr": replace(CONV, criterion="simclr"),
    "batch_norm": replace(CONV, backbone="resnet50"),
    "fewer_slots_than_ranks": replace(CONV, large=1, small=1, gamma=(1, 1), locations=False, feature_gamma=(1, 1)),
}


def part_of(batch: Batch, rank: int, world: int) -> Batch:
    def cut(x: Tensor) -> Tensor:
        return x.chunk(world)[rank]

    views = {k: View(cut(v.pixels), cut(v.window)) for k, v in batch.views.items()}
    return Batch(views, {k: cut(v) for k, v in batch.targets.items()}, cut(batch.label), cut(batch.index))


def ranks_agree_with_one_process(rank: int, world: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    vicregl.convnet = lambda name, **options: (small_resnet if name == "resnet50" else small_convnext)(name, **options)
    alone = {}
    for name, cfg in RANKS.items():
        method, batch = build(cfg), batch_of(cfg, 4)
        loss, metrics = method(batch, ZERO)
        state = {k: v.clone() for k, v in method.state_dict().items() if "running" in k}
        alone[name] = loss.detach(), torch.autograd.grad(loss, list(method.parameters())), metrics, state
    dist.init_process_group("gloo", rank=rank, world_size=world)
    calls = []
    for collective in ("all_reduce", "all_gather_into_tensor", "all_gather_single"):
        if hasattr(dist, collective):
            real = getattr(dist, collective)
            setattr(dist, collective, lambda *a, real=real, **k: (calls.append(1), real(*a, **k))[1])
    for name, cfg in RANKS.items():
        expected, gradient, metrics, state = alone[name]
        method, batch = build(cfg), part_of(batch_of(cfg, 4), rank, world)
        calls.clear()
        loss, parts = method(batch, ZERO)
        mine = [*torch.autograd.grad(loss, list(method.parameters())), loss.detach()]
        made = len(calls)
        averaged = [x.clone() for x in (*mine, *(parts[k] for k in parts if k.startswith(("global", "local"))))]
        for x in averaged:
            dist.all_reduce(x.div_(world))
        wanted = [*gradient, expected, *(metrics[k] for k in parts if k.startswith(("global", "local")))]
        scale = max(float(g.abs().max()) for g in gradient)
        for a, b in zip(averaged, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * scale)
        for k, v in state.items():
            torch.testing.assert_close(method.state_dict()[k], v, rtol=1e-6, atol=1e-8)
        if name != "batch_norm":  # metrics cost none: embeddings and cells forth and back, indices forth
            assert made <= 5, made
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_give_the_gradient_of_one_process(world):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(ranks_agree_with_one_process, (world, port), nprocs=world)


# ------------------------------------------------------------------------------------------------ LARS


def test_lars_by_hand():
    torch.manual_seed(0)
    weight, gain, still = (torch.nn.Parameter(torch.randn(s)) for s in ((3, 4), (5,), (2, 2)))
    with torch.no_grad():
        still.zero_()  # norm 0: trust 1
    start = [p.detach().clone().double() for p in (weight, gain, still)]
    optimizer = LARS([{"params": [weight, still], "weight_decay": 0.1}, {"params": [gain]}], lr=0.0)
    buffers = [torch.zeros_like(p) for p in start]
    for step in range(3):
        gradients = [torch.randn(p.shape) for p in (weight, gain, still)]
        for group in optimizer.param_groups:
            group["lr"] = 0.5 + step
        for p, g in zip((weight, gain, still), gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for i in range(3):
            g = gradients[i].double()
            if start[i].ndim > 1:
                g = g + 0.1 * start[i]
                g = g * (0.001 * start[i].norm() / g.norm() if start[i].norm() > 0 else 1.0)
            buffers[i] = 0.9 * buffers[i] + g
            start[i] = start[i] - (0.5 + step) * buffers[i]
        for p, expected in zip((weight, gain, still), start, strict=True):
            torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_lars_skips_a_step_that_is_not_finite():
    weight, gain = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))
    optimizer = LARS([weight, gain], lr=0.1)
    for p in (weight, gain):
        p.grad = torch.ones_like(p)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    before = (
        [p.detach().clone() for p in (weight, gain)],
        [s["momentum_buffer"].clone() for s in optimizer.state.values()],
    )
    assert (before[0][0] < 1).all()
    weight.grad[0, 0], gain.grad[1] = torch.nan, torch.inf
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for p, b in zip((weight, gain), before[0], strict=True):
        assert torch.equal(p.detach(), b)
    for s, b in zip(optimizer.state.values(), before[1], strict=True):
        assert torch.equal(s["momentum_buffer"], b)
