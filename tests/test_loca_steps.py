"""LOCA's step without correspondences, under autocast, over ranks, as one graph; and invalid settings."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loca_cases import START, VARIANTS, build, random_batch, tiny
from test_parallel import free_port, start
from torch._dynamo.testing import CompileCounterWithBackend

from pipeline import Batch, View
from trainer.methods.loca import Config, Method

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
        ({"focal_views": -1}, "count -1"),
        ({"position": "off", "clusters": "off"}, "nothing would be learned"),
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


@pytest.mark.slow
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


def test_shared_drop_path_is_one_graph() -> None:
    assert np.isfinite(steps(tiny(drop_path=0.1, drop_path_shared=True), "eager")).all()


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
