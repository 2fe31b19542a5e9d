"""LOCA's losses against plain loops, its published numbers and its teacher."""

import math

import numpy as np
import pytest
import torch
from loca_cases import EVERY, START, VARIANTS, build, random_batch, tiny
from oracles_loca import log_softmax, naive_loss
from torch import Tensor, nn

from pipeline import Batch, View, recipes
from trainer.methods.loca import Clusters, Config, CrossAttention, Method, sinkhorn, views


def test_cross_attention_from_its_definition() -> None:
    torch.manual_seed(0)
    block = CrossAttention(12, 3, attend=True).double()
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.3 * torch.randn_like(p))
    queries, reference = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 4, 12, dtype=torch.float64)

    def norm(layer: torch.nn.LayerNorm, x: Tensor) -> Tensor:
        return (x - x.mean()) / (x.var(correction=0) + 1e-6).sqrt() * layer.weight + layer.bias

    for b in range(2):
        keys, values = [], []
        for token in reference[b]:
            both = block.attn["kv"](norm(block.norm_reference, token))
            keys.append(both[:12])
            values.append(both[12:])
        for i in range(5):
            x = queries[b, i]
            q = block.attn["q"](norm(block.norm_query, x))
            seen = []
            for head in (slice(0, 4), slice(4, 8), slice(8, 12)):
                scores = torch.stack([(q[head] * k[head]).sum() / 2 for k in keys])  # 2 is the root of a head's width
                weights = scores.exp() / scores.exp().sum()
                seen.append(sum(w * v[head] for w, v in zip(weights, values, strict=True)))
            x = x + block.attn["proj"](torch.cat(seen))
            hidden = block.mlp.fc1(norm(block.norm_mlp, x))
            hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
            torch.testing.assert_close(block(queries, reference)[b, i], x + block.mlp.fc2(hidden))


def test_projector_has_three_layers_and_tanh_gelu() -> None:
    torch.manual_seed(0)
    head = Clusters(6, 5, 4).double()
    first, a, second, b, third = head.projector
    feature = x = torch.randn(6, dtype=torch.float64)
    for layer, activation in ((first, a), (second, b)):
        x = layer(x)
        expected = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        torch.testing.assert_close(activation(x), expected)
        x = expected
    cosine = head.prototypes.weight @ third(x) / head.prototypes.weight.norm(dim=1) / third(x).norm()
    torch.testing.assert_close(head(feature), cosine)
    assert (first.out_features, second.out_features, third.out_features) == (5, 5, 256)


@EVERY
def test_loss_and_gradients_against_the_loops(name: str) -> None:
    cfg = tiny(**VARIANTS[name])
    method, batch = build(cfg, dtype=torch.float64), random_batch(cfg)
    torch.manual_seed(7)
    keep, visible = method.draw(3, torch.device("cpu"))
    torch.manual_seed(7)  # the same draws
    loss, metrics = method(batch, START)
    expected, parts = naive_loss(method, batch, keep, visible)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert set(metrics) == {*parts, "valid_tokens"}
    for part, value in parts.items():
        torch.testing.assert_close(metrics[part].double(), value.detach().double(), rtol=1e-6, atol=1e-6)
        assert metrics[part].ndim == 0 and not metrics[part].requires_grad

    student = {name: p for name, p in method.student.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(loss, list(student.values()))
    theirs = torch.autograd.grad(expected, list(student.values()))
    for parameter, a, b in zip(student, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * max(1.0, b.abs().max().item()), msg=parameter)
    assert sum(g.abs().sum() for g in ours) > 0


def test_single_view_against_the_loops() -> None:
    cfg = tiny(position="single", clusters="off", eta=0.75, draws="sample", mask="unstructured")
    method, batch = build(cfg, dtype=torch.float64), random_batch(cfg)
    torch.manual_seed(7)
    _, visible = method.draw(3, torch.device("cpu"))
    torch.manual_seed(7)
    loss, metrics = method(batch, START)
    assert set(batch.views) == {"reference"} and views(cfg).targets is None
    assert visible.shape == (3, 4)

    losses, right = [], []
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    for b in range(3):
        image = ((batch.views["reference"].pixels[b, 0] / 255 - mean) / std).permute(2, 0, 1)
        context = torch.tensor([[i in visible[b] for i in range(16)]])
        tokens = method.student.backbone(image[None], positions=False, context=context)[0]
        for i, token in enumerate(tokens):
            logits = method.student.head(token)
            losses.append(-log_softmax(logits)[i])
            right.append(float(logits.argmax() == i))
    torch.testing.assert_close(loss, sum(losses) / len(losses), rtol=1e-6, atol=1e-6)
    assert metrics["position_accuracy"].item() == pytest.approx(np.mean(right))
    loss.backward()
    assert all(p.grad is not None for p in method.student.parameters() if p.requires_grad)
    assert not method.student.backbone.pos_embed.any()  # the exported network needs no positions either


# ---- Numbers of the published configuration --------------------------------------------------------------------------


def test_parameters_of_the_published_model() -> None:
    with torch.device("meta"):
        method = Method(Config())
    assert sum(p.numel() for p in method.student.parameters()) == 100_383_172
    assert sum(p.numel() for p in method.teacher.parameters()) == 100_383_172
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in method.student.named_children()}
    assert sizes["clusters"] == 7_344_384 and sizes["cross"] == 7_089_408
    assert sizes["norm"] == 1_536 and sizes["head"] == 150_724


def test_sinkhorn_of_the_released_code() -> None:
    cosine = [[0.3, 0.1, 0, -0.1], [0.25, 0.2, 0, 0], [0, 0, 0.1, 0.1], [0.3, 0, 0, 0], [0.2, -0.1, 0.05, 0]]
    cosine.append([0.3, 0.2, 0.1, 0])
    expected = [
        [0.621599, 0.264799, 0.092686, 0.020916],
        [0.094007, 0.804357, 0.038103, 0.063534],
        [0.000827, 0.019224, 0.367376, 0.612574],
        [0.687102, 0.039613, 0.102453, 0.170833],
        [0.169788, 0.009789, 0.508502, 0.311922],
        [0.181881, 0.572508, 0.200391, 0.045221],
    ]
    q = sinkhorn((torch.tensor(cosine) / 0.05).softmax(-1), 3)
    torch.testing.assert_close(q, torch.tensor(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(q.sum(0), torch.tensor([1.755202, 1.710290, 1.309510, 1.224998]), rtol=0, atol=2e-6)


def test_sinkhorn_survives_the_sharpest_targets() -> None:
    cosine = -torch.ones(50, 64)
    cosine[:, 0] = 1.0  # every token on one prototype, e^-40 on the others
    q = sinkhorn((cosine / 0.05).softmax(-1), 3)
    torch.testing.assert_close(q, torch.full_like(q, 1 / 64))


def test_start_values() -> None:
    cfg = Config("vit_nano_patch16", views=recipes.Loca(focal_views=1), drop_path=0.0)
    torch.manual_seed(0)
    method = Method(cfg)
    g = torch.Generator().manual_seed(0)
    found = {}
    for cut in views(cfg).cuts:  # one colour a patch: the tokens of plain noise would all look alike
        coarse = torch.rand(2 * cut.count, 3, cut.grid, cut.grid, generator=g) * 255
        pixels = torch.nn.functional.interpolate(coarse, (cut.size, cut.size)).byte()
        found[cut.kind] = View(pixels.permute(0, 2, 3, 1).unflatten(0, (2, cut.count)), torch.zeros(2, cut.count, 4))
    targets = {
        "query": torch.randint(196, (2, 1, 196), generator=g),
        "focal": torch.randint(196, (2, 1, 36), generator=g),
    }
    loss, metrics = method(Batch(found, targets, torch.zeros(2), torch.zeros(2)), START)
    assert metrics["position_loss"].item() == pytest.approx(math.log(196) + 0.5, abs=0.15)  # 5.78: logits of variance 1
    cluster = metrics["cluster_loss"] + metrics["me_max"] - math.log(4096)
    assert abs(cluster) < 0.5  # ln K and the negative entropy cancel
    assert loss.item() == pytest.approx((metrics["position_loss"] + cluster).item(), abs=1e-4)
    assert metrics["valid_tokens"] == 1.0


def test_initialisation_of_the_heads() -> None:
    torch.manual_seed(0)
    method = Method(tiny(backbone="vit_tiny_patch8", prototypes=512, hidden=256))
    student = method.student
    assert student.cross.attn["kv"].weight.abs().max().item() == pytest.approx(
        math.sqrt(6 / 384), rel=1e-2
    )  # square each
    assert student.cross.mlp.fc1.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 960), rel=1e-2)
    assert student.clusters.projector[2].weight.std().item() == pytest.approx(256**-0.5, rel=0.03)
    torch.testing.assert_close(student.clusters.prototypes.weight.norm(dim=1), torch.ones(512))
    for a, b in zip(student.parameters(), method.teacher.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b


# ---- The teacher -----------------------------------------------------------------------------------------------------


@EVERY
def test_gradients_reach_the_whole_student_and_no_teacher(name: str) -> None:
    cfg = tiny(**VARIANTS[name])
    method, batch = build(cfg), random_batch(cfg)
    loss, _ = method(batch, START)
    loss.backward()
    assert all(p.grad is not None for p in method.student.parameters() if p.requires_grad)  # DDP waits for each
    assert method.teacher is None or all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    trained = {id(p) for group in method.parameter_groups(0.1) for p in group["params"]}
    assert trained == {id(p) for p in method.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("step", "momentum"), [(0, 0.996), (18_765, 0.996218), (62_550, 0.998), (100_000, 0.999616), (125_100, 1.0)]
)
def test_momentum_of_the_teacher(step: int, momentum: float) -> None:
    method = Method(tiny())
    with torch.no_grad():
        for student, teacher in zip(method.student.parameters(), method.teacher.parameters(), strict=True):
            student.fill_(1.0)
            teacher.zero_()
    method.after_step(torch.tensor(step / 125_100))
    for p in method.teacher.parameters():  # every one: prototypes, cross-attention and head too
        assert p.flatten()[0].item() == pytest.approx(1 - momentum, abs=1e-6) and p.min() == p.max()


@pytest.mark.parametrize("clusters", ["patch", "off"])
@pytest.mark.parametrize("shared", [True, False])
def test_branches_dropped_together(shared: bool, clusters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where weights and pixels are the same, so are tokens, if the same branches were dropped."""
    cfg = tiny(drop_path=0.5, drop_path_shared=shared, focal_size=32, clusters=clusters, eta=0.0, mask="first")
    torch.manual_seed(0)
    method, count = Method(cfg), 64
    nn.init.zeros_(method.student.backbone.pos_embed)
    nn.init.zeros_(method.backbone().pos_embed)
    pixels = torch.randint(0, 256, (count, 1, 32, 32, 3), dtype=torch.uint8)
    images = {"reference": pixels, "query": pixels, "focal": pixels.expand(-1, 2, -1, -1, -1)}
    targets = {kind: torch.zeros(count, pixels.shape[1], 16) for kind, pixels in images.items()}
    seen = []
    monkeypatch.setattr(method, "draw", lambda *_: (torch.arange(16)[None], torch.arange(16)[None]))
    encode = method.encode
    monkeypatch.setattr(method, "encode", lambda *arguments: seen.append(encode(*arguments)) or seen[-1])
    method(
        Batch({k: View(v, torch.zeros(1)) for k, v in images.items()}, targets, torch.zeros(1), torch.zeros(1)), START
    )
    [(_, reference, (query, first, second))] = seen
    alike = [
        (reference - view).flatten(1).abs().amax(1) < 1e-4 for view in (query, first, second)
    ]  # whether an image's both branches of the last block, each dropped half the time, were
    assert [x.float().mean().item() == 1 for x in alike] == [shared, shared, False]
    assert all(0.1 < x.float().mean() < 0.5 for x in alike[2 if shared else 0 :])  # a quarter, by chance
    method.eval()
    seen.clear()
    method(
        Batch({k: View(v, torch.zeros(1)) for k, v in images.items()}, targets, torch.zeros(1), torch.zeros(1)), START
    )
    torch.testing.assert_close(seen[0][1], seen[0][2][2])  # nothing is dropped


def test_backbone_is_the_teacher_s() -> None:
    method = Method(tiny())
    assert method.backbone() is method.teacher.backbone
    alone = Method(tiny(clusters="off"))
    assert alone.teacher is None and alone.backbone() is alone.student.backbone
    alone.after_step(torch.tensor(0.5))


def test_weight_decay_of_the_released_code() -> None:
    method = Method(tiny())
    decayed, exempt = method.parameter_groups(0.1)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    decays = {name for name, p in method.student.named_parameters() if any(p is q for q in decayed["params"])}
    assert {"backbone.pos_embed", "clusters.prototypes.weight", "backbone.blocks.0.attn.qkv.bias"} <= decays
    assert {"cross.attn.q.bias", "cross.attn.kv.bias", "backbone.patch_embed.proj.weight"} <= decays
    for name in ("backbone.blocks.0.attn.proj.bias", "cross.attn.proj.bias", "backbone.norm.weight", "head.0.bias"):
        assert name not in decays
    assert "clusters.projector.0.bias" not in decays and "backbone.blocks.1.mlp.fc1.bias" not in decays
