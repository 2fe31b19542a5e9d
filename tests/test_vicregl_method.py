"""VICRegL as a method: its views, heads and settings, edge cases, one graph, other numbers of ranks."""

import os
import socket

import oracles_vicregl as oracle
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from vicregl_cases import CONV, TINY, ZERO, batch_of, build, changed, features, located, places, windows

from pipeline import Batch, recipes
from pipeline.batch import View
from trainer import backbones
from trainer.methods import vicregl
from trainer.methods.vicregl import Config, Method, Objective

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
    local = oracle.local_loss(maps, where, cfg.views.large, cfg.views.gamma, cfg.feature_gamma).sum()
    return cfg.alpha * oracle.global_loss(embeddings, cfg.views.large).sum() + (1 - cfg.alpha) * local


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
    cfg = TINY if name == TINY.backbone else changed(CONV, backbone=name)
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
    names = {alpha: dict(build(changed(CONV, alpha=alpha)).named_children()) for alpha in (0.0, 0.75, 1.0)}
    assert "expander" not in names[0.0] and "projector" in names[0.0]
    assert "projector" not in names[1.0] and "expander" in names[1.0]
    for alpha, part in ((0.0, "local"), (1.0, "global")):
        cfg = changed(CONV, alpha=alpha)
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
    assert vicregl.views(changed(TINY, alpha=1.0)).targets is None
    assert vicregl.views(changed(TINY, locations=False)).targets is None
    released = vicregl.views(changed(TINY, fidelity="released"))
    assert released.std[0] == 0.228 and vicregl.views(TINY).std == recipes.IMAGENET_STD
    assert (released.targets({"large": large, "small": small})["matches"] != targets["matches"]).any()
    alone = vicregl.views(Config(backbone="resnet50", views=recipes.VICRegLResNet50()))
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
        changed(TINY, **wrong)
    assert message in str(caught.value)


def test_an_unknown_backbone_is_named():
    with pytest.raises(ValueError, match="unknown backbone 'convnext_huge'"):
        backbones.convnet("convnext_huge")


# ------------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("criterion", ["vicreg", "simclr"])
@pytest.mark.parametrize("count", [1, 3])
def test_loss_stays_finite_where_nothing_varies(count, criterion):
    cfg = changed(TINY, criterion=criterion)
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
    objective = Objective(changed(TINY, criterion=criterion))
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
    cfg = changed(TINY, backbone=name, size=96, small_size=64)
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
    "all": changed(CONV, gamma=None, feature_gamma=None),
    "simclr": changed(CONV, criterion="simclr"),
    "batch_norm": changed(CONV, backbone="resnet50"),
    "fewer_slots_than_ranks": changed(CONV, large=1, small=1, gamma=(1, 1), locations=False, feature_gamma=(1, 1)),
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


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_gradient_of_one_process(world):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(ranks_agree_with_one_process, (world, port), nprocs=world)
