"""LOCA's views: its draws, its cuts, the places of the queries, and its predictions of them."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from loca_cases import START, VARIANTS, build, random_batch, tiny
from torch import Tensor

from pipeline import View, recipes
from trainer.methods._loca_ablations import box_distance, centre, relative_boxes
from trainer.methods.loca import Config, Method, views

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


# ---- Views, boxes, pictures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("focal", [0, 1, 4, 9])
def test_views(focal: int) -> None:
    cuts = {cut.kind: cut for cut in views(Config(views=recipes.Loca(focal_views=focal))).cuts}
    assert set(cuts) == ({"reference", "query", "focal"} if focal else {"reference", "query"})
    assert not focal or (cuts["focal"].count, cuts["focal"].grid) == (focal, 6)
    assert cuts["reference"].grid == cuts["query"].grid == 14


WINDOWS = {  # the reference is 280 x 280 at (40, 60); the query 96 x 192 at (100, 200)
    "reference": np.array([[[40, 60, 320, 340]]], np.float32),
    "query": np.array([[[0, 0, 400, 400]]], np.float32),
    "focal": np.array([[[100, 200, 196, 392], [100, 392, 196, 200], [40, 300, 60, 340]]], np.float32),
}


def test_patches_are_the_backbone_s() -> None:
    assert [cut.grid for cut in views(Config("vit_pico_patch8")).cuts] == [28, 28, 12]
    assert Config("vit_pico_patch8", views=recipes.Loca(patch=8)).views.patch == 8
    with pytest.raises(ValueError, match=r"views\.patch is 16: vit_pico_patch8 has patches of 8"):
        Config("vit_pico_patch8", views=recipes.Loca(patch=16))


def test_views_carry_the_target_rule_and_the_boxes() -> None:
    windows = {kind: w[:, : None if kind == "focal" else 1] for kind, w in WINDOWS.items()}
    targets = {}
    for rule in ("released", "overlap"):
        recipe = views(Config(views=recipes.Loca(focal_views=3, rule=rule), position="box"))
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


def test_box_distance() -> None:
    a = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2], [0.25, 0.5, 0.5, 1.0]])
    b = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.7, 0.3, 0.2, 0.2], [0.5, 0.5, 1.0, 1.0]])
    loss, iou = box_distance(a, b)
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
