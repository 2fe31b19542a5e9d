"""LOCA's losses against loop-written ones, its draws, its teacher, and every variant of the paper's tables."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_parallel import free_port, start
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pipeline import Batch, View
from trainer.backbones import VIT_SIZES
from trainer.boxes import box_loss, relative_boxes
from trainer.methods.loca import Clusters, Config, CrossAttention, Method, centre, sinkhorn, views

VIT_SIZES["speck"] = (16, 2, 2)
TINY = Config(
    "vit_speck_patch8", drop_path=0.0, size=32, focal_size=16, queries=3, query_keep=0.5, hidden=24, prototypes=8
)
START = torch.tensor(0.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads take six times as long over tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**changes: Any) -> Config:
    return dataclasses.replace(TINY, **changes)


def random_batch(cfg: Config, count: int = 3, seed: int = 0, misses: float = 0.3) -> Batch:
    """Random pixels and targets; a share of `misses` query patches has no target."""
    g = torch.Generator().manual_seed(seed)
    found, targets = {}, {}
    for cut in views(cfg).cuts:
        pixels = torch.randint(0, 256, (count, cut.count, cut.size, cut.size, 3), dtype=torch.uint8, generator=g)
        found[cut.kind] = View(pixels, torch.zeros(count, cut.count, 4))
        if cut.kind != "reference":
            n = (cfg.size // 8) ** 2
            places = torch.randint(0, n, (count, cut.count, cut.grid**2), dtype=torch.int32, generator=g)
            targets[cut.kind] = places.masked_fill(torch.rand(places.shape, generator=g) < misses, -1)
    if cfg.position == "box":
        low, sides = torch.rand(2, count, cfg.queries, 2, generator=g) * 0.4 + 0.1
        targets["box"] = torch.cat([low + sides / 2, sides], -1)
        targets["box"][0, 1] = -1
    return Batch(found, targets, torch.full((count,), -1), torch.arange(count))


def build(cfg: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> Method:
    """A method whose teacher has left its student, and whose biases are not all 0."""
    torch.manual_seed(seed)
    method = Method(cfg).to(dtype)
    with torch.no_grad():
        for branch in (method.student, method.teacher or method.student):
            for p, q in zip(branch.parameters(), method.student.parameters(), strict=True):
                p.add_(0.05 * torch.randn_like(p) * q.requires_grad)
    return method


# ---- The losses, written out -----------------------------------------------------------------------------------------


def log_softmax(row: Tensor) -> Tensor:
    return row - row.exp().sum().log()


def cosines(head: torch.nn.Module, feature: Tensor) -> Tensor:
    x, weight = head.projector(feature), head.prototypes.weight
    return weight @ x / weight.square().sum(1).sqrt() / x.square().sum().sqrt()


def naive_sinkhorn(rows: list[list[float]], iterations: int) -> list[list[float]]:
    for _ in range(iterations):
        for k in range(len(rows[0])):
            total = sum(row[k] for row in rows)
            for row in rows:
                row[k] /= total
        rows = [[x / sum(row) for x in row] for row in rows]
    return rows


def mean_of_valid(cfg: Config, by_query: list[list[Tensor]]) -> Tensor:
    """Each inner list holds the losses of one query's valid tokens."""
    if cfg.average == "pooled":
        by_query = [[x for query in by_query for x in query]]
    means = [sum(query) / len(query) for query in by_query if query]
    return sum(means) / len(means) if means else torch.zeros(())


def naive_iou(a: list[Tensor], b: list[Tensor]) -> tuple[Tensor, Tensor]:
    def edges(box: list[Tensor], axis: int) -> tuple[Tensor, Tensor]:
        return box[axis] - box[axis + 2] / 2, box[axis] + box[axis + 2] / 2

    overlap, hull = torch.tensor(1.0), torch.tensor(1.0)
    for axis in (0, 1):
        (a0, a1), (b0, b1) = edges(a, axis), edges(b, axis)
        overlap = overlap * max(min(a1, b1) - max(a0, b0), torch.tensor(0.0))
        hull = hull * (max(a1, b1) - min(a0, b0))
    union = a[2] * a[3] + b[2] * b[3] - overlap
    return overlap / union, overlap / union - (hull - union) / hull


def naive_loss(method: Method, batch: Batch, keep: Tensor, visible: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, image by image, view by view, token by token."""
    cfg, student, teacher = method.cfg, method.student, method.teacher
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])

    def encode(
        vit: torch.nn.Module, pixels: Tensor, keep: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Patch tokens, and the feature of the whole view."""
        tokens = vit(((pixels / 255 - mean) / std).permute(2, 0, 1)[None], keep, **kwargs)[0]
        return tokens[int(cfg.clusters == "cls") :], tokens[0] if cfg.clusters == "cls" else tokens.mean(0)

    count = len(batch.index)
    assignments: list[list[float]] = []  # of every teacher row, then evened out
    position: list[list[Tensor]] = []
    queries: list[tuple[int, Tensor, list[int]]] = []  # image, features to cluster, row of each or -1
    right = []
    ious = []
    for b in range(count):
        pixels = batch.views["reference"].pixels[b, 0]
        seen = visible[min(b, len(visible) - 1)]
        reference = None
        if teacher is not None:
            with torch.no_grad():
                tokens, whole = encode(teacher.backbone, pixels)
                reference = tokens[seen]
                features = tokens if cfg.clusters == "patch" else [whole]
                assignments += [log_softmax(cosines(teacher.clusters, x) / 0.05).exp().tolist() for x in features]
        elif len(seen):
            reference, _ = encode(student.backbone, pixels, seen)
        for v in range(cfg.queries):
            kind, view = ("query", 0) if v == 0 else ("focal", v - 1)
            kept = keep[min(b, len(keep) - 1)] if v == 0 else torch.arange(4)
            tokens, whole = encode(
                student.backbone,
                batch.views[kind].pixels[b, view],
                kept if v == 0 else None,
                positions=cfg.clusters != "off",
            )
            target = [int(batch.targets[kind][b, view, i]) for i in kept]
            if cfg.position in ("patch", "centre", "box"):
                after = student.norm(student.cross(tokens[None], None if reference is None else reference[None]))[0]
                losses = []
                if cfg.position == "box" and batch.targets["box"][b, v, 2] > 0:
                    guess = list(student.head(after.mean(0)).sigmoid())
                    box = list(batch.targets["box"][b, v])
                    iou, generalised = naive_iou(guess, box)
                    distance = sum(abs(x - y) for x, y in zip(guess, box, strict=True))
                    losses.append(5 * distance + 2 * (1 - generalised))
                    ious.append(iou)
                for i, place in enumerate(target):
                    middle = int(kept[i]) == (10 if v == 0 else 3)  # of a 4 x 4 and a 2 x 2 grid
                    if cfg.position != "box" and place >= 0 and (cfg.position == "patch" or middle):
                        logits = student.head(after[i])
                        losses.append(-log_softmax(logits)[place])
                        right.append(float(logits.argmax() == place))
                position.append(losses)
            if cfg.clusters == "patch":
                queries.append((b, tokens, target))
            elif cfg.clusters != "off":
                queries.append((b, whole[None], [0]))

    parts = {"position_loss": mean_of_valid(cfg, position)} if cfg.position != "off" else {}
    if cfg.position in ("patch", "centre"):
        parts["position_accuracy"] = torch.tensor(sum(right) / len(right))
    if cfg.position == "box":
        parts["box_iou"] = sum(ious) / len(ious)
    total = parts.get("position_loss", torch.zeros(()))
    if cfg.clusters != "off":
        assignments = naive_sinkhorn(assignments, cfg.sinkhorn)
        rows_each = len(assignments) // count
        cluster, predictions = [], []
        for b, features, rows in queries:
            losses = []
            for feature, row in zip(features, rows, strict=True):
                prediction = log_softmax(cosines(student.clusters, feature) / 0.1)
                predictions.append(prediction.exp())
                if row >= 0:
                    target = torch.tensor(assignments[b * rows_each + row], dtype=prediction.dtype)
                    losses.append(-(target * prediction).sum())
            cluster.append(losses)
        mean_prediction = sum(predictions) / len(predictions)
        negative_entropy = sum(p * p.log() for p in mean_prediction)
        parts["cluster_loss"] = mean_of_valid(cfg, cluster)
        parts["me_max"] = negative_entropy + math.log(cfg.prototypes)
        parts["target_entropy"] = torch.tensor(-sum(x * math.log(x) for row in assignments for x in row)) / len(
            assignments
        )
        parts["prototypes_in_use"] = torch.tensor(float(len({int(np.argmax(row)) for row in assignments})))
        total = total + parts["cluster_loss"] + cfg.me_max * negative_entropy
    return total, parts


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


VARIANTS = {
    "released": {},
    "first": {"mask": "first"},
    "unstructured": {"mask": "unstructured"},
    "everything visible": {"eta": 0.0},
    "half visible": {"eta": 0.5},
    "invisible": {"eta": 1.0},
    "per sample": {"draws": "sample"},
    "unstructured per sample": {"draws": "sample", "mask": "unstructured"},
    "one query": {"queries": 1},
    "two queries": {"queries": 2},
    "16 prototypes": {"prototypes": 16},
    "no sinkhorn": {"sinkhorn": 0},
    "no me-max": {"me_max": 0.0},
    "neither": {"sinkhorn": 0, "me_max": 0.0},
    "position only": {"clusters": "off"},
    "position only, invisible": {"clusters": "off", "eta": 1.0},
    "cluster only": {"position": "off"},
    "central patch": {"position": "centre"},
    "central patch only, per sample": {"position": "centre", "clusters": "off", "draws": "sample"},
    "box": {"position": "box"},
    "box only": {"position": "box", "clusters": "off"},
    "cls": {"clusters": "cls"},
    "gap": {"clusters": "gap"},
    "cls only": {"clusters": "cls", "position": "off"},
    "per query": {"average": "query"},
    "per query, central patch": {"average": "query", "position": "centre"},
    "all tokens of the random query": {"query_keep": 1.0},
}
EVERY = pytest.mark.parametrize("name", VARIANTS)


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
    cfg = Config("vit_nano_patch16", queries=2, drop_path=0.0)
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
    learnt = {id(p) for group in method.parameter_groups(0.1) for p in group["params"]}
    assert learnt == {id(p) for p in method.parameters() if p.requires_grad}


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


# ---- Draws -----------------------------------------------------------------------------------------------------------


def draws(**changes: Any) -> list[tuple[Tensor, Tensor]]:
    with torch.device("meta"):
        method = Method(Config("vit_nano_patch16", hidden=8, **changes))
    torch.manual_seed(0)
    return [method.draw(3, torch.device("cpu")) for _ in range(300)]


def test_consecutive_tokens_are_visible() -> None:
    many = draws()
    for keep, visible in many:
        assert visible.shape == (1, 39) and (visible.diff() == 1).all() and 0 <= visible[0, 0] <= 157
        assert keep.shape == (1, 70) and len(set(keep[0].tolist())) == 70
    starts = [visible[0, 0].item() for _, visible in many]
    assert min(starts) < 8 and max(starts) > 149 and len(set(starts)) > 100
    assert {i for keep, _ in many for i in keep[0].tolist()} == set(range(196))


def test_other_masks() -> None:
    assert all(torch.equal(visible, torch.arange(39)[None]) for _, visible in draws(mask="first"))
    for _, visible in draws(mask="unstructured"):
        assert len(set(visible[0].tolist())) == 39
    assert not (visible[0].sort().values.diff() == 1).all()
    assert draws(eta=0.0)[0][1].tolist() == [list(range(196))]
    assert draws(eta=1.0)[0][1].shape == (1, 0)
    assert draws(eta=0.9)[0][1].shape == (1, 19)


@pytest.mark.parametrize("mask", ["consecutive", "unstructured"])
def test_draws_per_sample(mask: str) -> None:
    keep, visible = draws(mask=mask, draws="sample")[0]
    assert keep.shape == (3, 70) and visible.shape == (3, 39)
    assert len({tuple(row) for row in visible.tolist()}) == len({tuple(row) for row in keep.tolist()}) == 3


def test_a_located_central_patch_is_always_kept() -> None:
    for keep, _ in draws(position="centre"):
        assert keep[0, 0] == centre(14) == 105 and len(set(keep[0].tolist())) == 70


@pytest.mark.parametrize("clusters", ["patch", "off"])
def test_an_invisible_reference_does_not_matter(clusters: str) -> None:
    for eta in (1.0, 0.8):
        cfg = tiny(eta=eta, clusters=clusters, mask="first")
        method, batch = build(cfg), random_batch(cfg)
        other = dict(
            batch.views, reference=View(255 - batch.views["reference"].pixels, batch.views["reference"].window)
        )
        losses = []
        for found in (batch.views, other):
            torch.manual_seed(0)
            losses.append(method(dataclasses.replace(batch, views=found), START)[1]["position_loss"])
        assert torch.equal(*losses) == (eta == 1.0)


# ---- What can go wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["pooled", "query"])
@pytest.mark.parametrize("position", ["patch", "centre", "box"])
def test_without_correspondences_the_loss_is_zero(position: str, average: str) -> None:
    cfg = tiny(position=position, average=average, me_max=0.0)
    method, batch = build(cfg), random_batch(cfg, misses=1.1)
    if position == "box":
        batch.targets["box"].fill_(-1)
    loss, metrics = method(batch, START)
    loss.backward()
    assert loss == 0 and metrics["position_loss"] == 0 and metrics["cluster_loss"] == 0 and metrics["valid_tokens"] == 0
    assert all(torch.isfinite(p.grad).all() for p in method.student.parameters())


@pytest.mark.parametrize("name", ["released", "box", "cls", "position only"])
def test_bf16_autocast(name: str) -> None:
    cfg = tiny(**VARIANTS[name])
    method, batch = build(cfg), random_batch(cfg)
    seen = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, metrics = method(batch, START)
        loss.backward()
        assert loss.dtype == torch.float32
        seen.append((loss.item(), {k: v.item() for k, v in metrics.items()}))
    assert seen[0][0] != seen[1][0] and seen[0][0] == pytest.approx(seen[1][0], rel=0.02)
    assert all(torch.isfinite(p.grad).all() for p in method.student.parameters())


def test_cosines_stay_in_full_precision_under_autocast() -> None:
    method = build(tiny())
    x = torch.randn(50, 16)
    with torch.autocast("cpu", torch.bfloat16):
        cosine = method.student.clusters(x)
        feature = method.student.clusters.projector(x).float()
    prototypes = method.student.clusters.prototypes.weight
    expected = torch.nn.functional.cosine_similarity(feature[:, None], prototypes[None], dim=-1)
    torch.testing.assert_close(cosine, expected, rtol=0, atol=1e-6)


def test_the_most_prototypes_of_the_paper() -> None:
    """16,384 (Table 6c); against the loops it would take minutes."""
    cfg = tiny(prototypes=16384)
    loss, parts = build(cfg)(random_batch(cfg), START)
    loss.backward()
    assert torch.isfinite(loss) and 0 <= parts["me_max"] <= math.log(16384) and 1 <= parts["prototypes_in_use"] <= 16384


def test_me_max_is_never_negative() -> None:
    method = build(tiny(prototypes=4096))
    batch = random_batch(tiny())
    with torch.no_grad():
        method.student.clusters.projector[-1].weight.zero_()  # one prediction for all
        method.student.clusters.prototypes.weight.copy_(method.student.clusters.prototypes.weight[:1].expand(4096, -1))
    assert method(batch, START)[1]["me_max"] == pytest.approx(0, abs=1e-5)
    assert method(batch, START)[1]["me_max"] >= 0


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_low_temperature_leaves_everything_finite(side: str) -> None:
    """Prototypes that nothing resembles get a probability of 0, whose logarithm is none."""
    method = build(tiny(prototypes=512, **{f"{side}_temperature": 0.001}))
    batch = random_batch(tiny())
    loss, metrics = method(batch, START)
    loss.backward()
    assert all(torch.isfinite(value) for value in (loss, *metrics.values()))
    assert all(torch.isfinite(p.grad).all() for p in method.student.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eta": 1.5}, "eta is 1.5"),
        ({"query_keep": 0.0}, "query_keep is 0"),
        ({"queries": 0}, "queries must be at least 1"),
        ({"position": "off", "clusters": "off"}, "nothing would be learnt"),
        ({"position": "single"}, "clusters off"),
        ({"position": "single", "clusters": "off", "eta": 1.0}, "eta < 1"),
    ],
)
def test_bad_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny(**changes)


def test_a_bad_backbone_is_named() -> None:
    with pytest.raises(ValueError, match="vit_speck"):
        Method(tiny(backbone="vit_speck"))


# ---- Views, boxes, pictures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 2, 5, 10])
def test_views(queries: int) -> None:
    cuts = {cut.kind: cut for cut in views(Config(queries=queries)).cuts}
    assert set(cuts) == ({"reference", "query", "focal"} if queries > 1 else {"reference", "query"})
    assert queries == 1 or (cuts["focal"].count, cuts["focal"].grid) == (queries - 1, 6)
    assert cuts["reference"].grid == cuts["query"].grid == 14


WINDOWS = {  # the reference is 280 x 280 at (40, 60); the query 96 x 192 at (100, 200)
    "reference": np.array([[[40, 60, 320, 340]]], np.float32),
    "query": np.array([[[0, 0, 400, 400]]], np.float32),
    "focal": np.array([[[100, 200, 196, 392], [100, 392, 196, 200], [40, 300, 60, 340]]], np.float32),
}


def test_views_carry_the_target_rule_and_the_boxes() -> None:
    windows = {kind: w[:, : None if kind == "focal" else 1] for kind, w in WINDOWS.items()}
    targets = {}
    for rule in ("released", "overlap"):
        recipe = views(Config(queries=4, rule=rule, position="box"))
        assert recipe.targets is not None
        targets[rule] = recipe.targets(windows)
        assert targets[rule]["query"].shape == (1, 1, 196) and targets[rule]["focal"].shape == (1, 3, 36)
    assert (targets["released"]["focal"] != targets["overlap"]["focal"]).any()
    assert targets["released"]["focal"][0, 0, :6].tolist() == [49, 51, 53, 54, -1, -1]
    np.testing.assert_allclose(targets["released"]["box"][0, 0], [0.5, 0.5, 1, 1])
    np.testing.assert_allclose(
        targets["released"]["box"][0, 1:], relative_boxes(windows["reference"], windows["focal"])[0]
    )


def test_boxes_of_the_released_code() -> None:
    boxes = relative_boxes(WINDOWS["reference"], WINDOWS["focal"])
    y, x, h, w = 60 / 280, 0.5, 96 / 280, 0.5  # cut off at the reference's edge
    np.testing.assert_allclose(boxes[0, 0], [y + h / 2, x + w / 2, h, w], rtol=1e-6)
    np.testing.assert_allclose(boxes[0, 1], boxes[0, 0])  # the query's own mirror image fills the same box
    assert (boxes[0, 2] == -1).all()  # 20 of 280 rows: below a tenth
    mirrored = relative_boxes(WINDOWS["reference"][..., [0, 3, 2, 1]], WINDOWS["focal"])
    np.testing.assert_allclose(mirrored[0, 0], [y + h / 2, 1 - x - w / 2, h, w], rtol=1e-6)


def test_box_loss() -> None:
    a = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2], [0.25, 0.5, 0.5, 1.0]])
    b = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.7, 0.3, 0.2, 0.2], [0.5, 0.5, 1.0, 1.0]])
    loss, iou = box_loss(a, b)
    torch.testing.assert_close(iou, torch.tensor([1.0, 0.0, 0.5]))
    # the second pair lies 0.4 apart in a hull of 0.6 x 0.2: GIoU = -(0.12 - 0.08) / 0.12
    torch.testing.assert_close(loss, torch.tensor([0.0, 5 * 0.4 + 2 * (1 + 1 / 3), 5 * 0.75 + 2 * 0.5]))


@pytest.mark.parametrize("name", ["released", "one query", "central patch", "position only", "invisible", "cls"])
def test_places_are_those_of_the_loss(name: str) -> None:
    cfg = tiny(**{"mask": "first", "query_keep": 1.0, **VARIANTS[name]})
    method, batch = build(cfg).eval(), random_batch(cfg, count=16)
    places, visible = method.place(batch)
    assert visible.shape == (1, cfg.visible(16))
    assert {kind: p.shape for kind, p in places.items()} == {kind: t.shape for kind, t in batch.targets.items()}
    right = valid = 0.0
    for kind, target in batch.targets.items():
        scored = target >= 0
        if cfg.position == "centre":
            scored &= torch.arange(target.shape[-1]) == centre(math.isqrt(target.shape[-1]))
        right += ((places[kind] == target) & scored).sum().item()
        valid += scored.sum().item()
    assert method(batch, START)[1]["position_accuracy"].item() == pytest.approx(right / valid)
    assert right > 0


def test_other_variants_place_no_patches() -> None:
    for changes in ({"position": "box"}, {"position": "off"}, {"position": "single", "clusters": "off"}):
        cfg = tiny(**changes)
        assert build(cfg).place(random_batch(cfg))[0] == {}


# ---- Ranks and compilation -------------------------------------------------------------------------------------------


def halves_agree(rank: int, world: int, port: str) -> None:
    """Ranks with equally many valid tokens: a pooled mean is per rank, so unequal ones weigh differently."""
    for changes in ({}, {"clusters": "gap", "average": "query"}):
        cfg = tiny(mask="first", query_keep=1.0, **changes)
        method, batch = build(cfg, dtype=torch.float64), random_batch(cfg, count=4, misses=0.0)
        for kind in batch.targets:
            batch.targets[kind][:, :, ::3] = -1
        alone, metrics = method(batch, START)
        expected = torch.autograd.grad(alone, list(method.student.parameters()))
        if not dist.is_initialized():
            start(rank, world, port)
        part = slice(rank * 2, rank * 2 + 2)
        mine = Batch(
            {kind: View(view.pixels[part], view.window[part]) for kind, view in batch.views.items()},
            {kind: target[part] for kind, target in batch.targets.items()},
            batch.label[part],
            batch.index[part],
        )
        loss, parts = method(mine, START)
        ours = torch.autograd.grad(loss, list(method.student.parameters()))
        torch.testing.assert_close(parts["me_max"], metrics["me_max"], rtol=1e-9, atol=1e-9)
        for a, b in zip([loss.detach(), *ours], [alone.detach(), *expected], strict=True):
            mean = a.clone()
            dist.all_reduce(mean)
            torch.testing.assert_close(mean / world, b, rtol=1e-6, atol=1e-10)
        dist.destroy_process_group()


def test_two_ranks_give_one_process_s_loss_and_gradient() -> None:
    mp.spawn(halves_agree, (2, free_port()), 2)


def steps(cfg: Config, backend: str) -> list[float]:
    """Losses of four steps, with other draws and another progress each, that must share one graph compiled once."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    method = build(cfg)
    method.compile(backend=counter, fullgraph=True, dynamic=False)
    losses = []
    for step in range(4):
        torch.manual_seed(step)
        loss, _ = method(random_batch(cfg, seed=step), torch.tensor(step / 4))
        loss.backward()
        method.after_step(torch.tensor(step / 4))
        losses.append(loss.item())
    assert counter.frame_count == 1
    return losses


ONE_GRAPH = [
    "box",
    "cls",
    "position only",
    "invisible",
    "unstructured per sample",
    "per query, central patch",
    "single",
]


@pytest.mark.parametrize("name", ["released", *(pytest.param(name, marks=pytest.mark.slow) for name in ONE_GRAPH)])
def test_one_graph(name: str) -> None:
    changes = {"position": "single", "clusters": "off"} if name == "single" else VARIANTS[name]
    assert np.isfinite(steps(tiny(drop_path=0.1, **changes), "eager")).all()


@pytest.mark.slow
def test_the_compiled_step_computes_the_same() -> None:
    cfg = tiny(mask="first", query_keep=1.0)  # what is drawn does not matter: inductor draws otherwise
    method = build(cfg)
    losses = []
    for step in range(4):
        loss, _ = method(random_batch(cfg, seed=step), START)
        loss.backward()
        method.after_step(torch.tensor(step / 4))
        losses.append(loss.item())
    assert steps(cfg, "inductor") == pytest.approx(losses, rel=1e-5)
