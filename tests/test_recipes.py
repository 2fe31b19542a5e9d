"""Recipes: published numbers, differences between the fidelities, names and pickling."""

import json
import pickle
from dataclasses import fields, replace

import numpy as np
import pytest

from pipeline import draws, recipes
from pipeline.correspondence import pair_matches, patch_targets
from pipeline.recipes import Augmentation, Cut, Recipe, describe
from pipeline.windows import unflipped
from trainer import methods

ALL = [recipes.loca, recipes.vicregl, recipes.vicregl_resnet50, recipes.plain]
EACH = [make(fidelity) for make in ALL for fidelity in ("paper", "released")] + [recipes.evaluation()]


def windows(recipe: Recipe, count: int = 40) -> dict[str, np.ndarray]:
    sizes = np.full((count, 2), (375, 500), np.int32)
    drawn, _ = draws.draw(draws.distributions(recipe), 1, 0, np.arange(count), sizes)
    ends = np.cumsum([cut.count for cut in recipe.cuts])
    return dict(zip([cut.kind for cut in recipe.cuts], np.split(drawn, ends[:-1], axis=1), strict=True))


@pytest.mark.parametrize("recipe", EACH, ids=lambda r: f"{r.name}-{r.fidelity}")
def test_a_recipe_can_be_drawn_described_and_carried(recipe: Recipe) -> None:
    described = json.loads(json.dumps(describe(recipe)))
    assert described == describe(recipe)
    assert described["fidelity"] == recipe.fidelity and len(described["cuts"]) == len(recipe.cuts)
    carried = pickle.loads(pickle.dumps(recipe))
    assert carried == recipe and describe(carried) == described
    seen = windows(recipe)
    assert {kind: w.shape[1] for kind, w in seen.items()} == {cut.kind: cut.count for cut in recipe.cuts}
    if recipe.targets:
        assert all(t.dtype == np.int32 and len(t) == 40 for t in carried.targets(seen).values())


def test_every_field_of_a_recipe_shows_in_its_description() -> None:
    recipe = recipes.loca("paper")
    cut, augmentation = recipe.cuts[0], recipe.cuts[0].augmentations[0]
    for change in (
        {"size": 192},
        {"sampler": "tensorflow"},
        {"scale": (0.1, 1.0)},
        {"flip": 0.25},
        {"antialias": False},
        {"augmentations": (replace(augmentation, sigma=(0.1, 1.9)),)},
    ):
        assert describe(replace(recipe, cuts=(replace(cut, **change), *recipe.cuts[1:]))) != describe(recipe)
    assert describe(recipes.loca(rule="overlap")) != describe(recipe)
    assert describe(replace(recipe, targets=None)) != describe(recipe)
    assert describe(recipes.vicregl(gamma=(10, 2))) != describe(recipes.vicregl())


def test_loca_has_its_published_views() -> None:
    for fidelity in ("paper", "released"):
        recipe = recipes.loca(fidelity)
        kinds = [(c.kind, c.count, c.size, c.grid, c.scale) for c in recipe.cuts]
        assert kinds == [
            ("reference", 1, 224, 14, (0.32, 1.0)),
            ("query", 1, 224, 14, (0.32, 1.0)),
            ("focal", 9, 96, 6, (0.05, 0.32)),
        ]
        paper = fidelity == "paper"
        assert [c.flip for c in recipe.cuts] == [0.5 if paper else 0, 0.5, 0.5]
        looks = [c.augmentations[0] for c in recipe.cuts]
        assert [c.blur for c in looks] == ([1.0, 0.1, 0.5] if paper else [0, 0, 0])
        assert [c.solarize for c in looks] == [0, 0.2, 0]
        assert {(c.jitter, c.gray, c.brightness, c.contrast, c.saturation, c.hue) for c in looks} == {
            (0.8, 0.2, 0.4, 0.4, 0.2, 0.1)
        }
        expected = ("torchvision", True) if paper else ("tensorflow", False)
        assert {(c.sampler, c.antialias) for c in recipe.cuts} == {expected}
        assert {c.rule for c in looks} == {expected[0]}


def test_loca_sizes_and_queries_can_be_set() -> None:
    recipe = recipes.loca(focal_views=4, patch=14, focal_size=98, scale=(0.5, 1.0), focal_scale=(0.1, 0.2))
    assert [(c.count, c.size, c.grid) for c in recipe.cuts] == [(1, 224, 16), (1, 224, 16), (4, 98, 7)]
    assert [c.scale for c in recipe.cuts] == [(0.5, 1.0), (0.5, 1.0), (0.1, 0.2)]
    targets = recipe.targets(windows(recipe))
    assert {k: t.shape for k, t in targets.items()} == {"query": (40, 1, 256), "focal": (40, 4, 49)}
    alone = recipes.loca(focal_views=0)
    assert [c.kind for c in alone.cuts] == ["reference", "query"] and list(alone.targets(windows(alone))) == ["query"]


AUGMENTATION = {
    "flip": 0.25,
    "jitter": 0.5,
    "strength": (0.1, 0.3, 0.5, 0.05),
    "gray": 0.1,
    "sigma": (0.5, 1.0),
    "solarize": 0.3,
}


@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_augmentation_can_be_set(fidelity) -> None:
    for make, blur in ((recipes.loca, (0.2, 0.4, 0.6)), (recipes.vicregl, (0.2, 0.4))):
        recipe = make(fidelity, **AUGMENTATION, blur=blur)
        unmirrored = ["reference"] if (recipe.name, fidelity) == ("loca", "released") else []
        assert [cut.kind for cut in recipe.cuts if cut.flip != 0.25] == unmirrored
        looks = [look for cut in recipe.cuts for look in cut.augmentations]
        assert {(c.jitter, c.gray, c.sigma) for c in looks} == {(0.5, 0.1, (0.5, 1.0))}
        assert {(c.brightness, c.contrast, c.saturation, c.hue) for c in looks} == {AUGMENTATION["strength"]}
        assert [c.blur for c in looks] == [*blur, *blur][: len(looks)]
        assert [c.solarize for c in looks] == ([0, 0.3, 0] if recipe.name == "loca" else [0, 0.3, 0, 0.3])


SETTINGS = {
    recipes.Loca: AUGMENTATION
    | {"fidelity": "paper", "focal_views": 4, "patch": 8, "size": 448, "focal_size": 112, "scale": (0.1, 0.2)}
    | {"focal_scale": (0.1, 0.2), "blur": (0.2, 0.4, 0.6), "rule": "overlap"},
    recipes.VICRegL: AUGMENTATION
    | {"fidelity": "released", "large": 3, "small": 2, "size": 448, "small_size": 128, "stride": 16}
    | {"large_scale": (0.1, 0.2), "small_scale": (0.1, 0.2), "blur": (0.2, 0.4), "gamma": None, "flip_aware": False},
    recipes.Plain: {"fidelity": "released", "size": 96, "scale": (0.1, 0.2), "patch": 8},
    recipes.Evaluation: {"size": 96, "resize": 288, "interpolation": "bicubic", "patch": 8},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_reaches_the_views(settings) -> None:
    changes = SETTINGS[settings]
    assert {field.name for field in fields(settings)} == set(changes)
    for name, value in changes.items():
        assert describe(settings(**{name: value}).recipe()) != describe(settings().recipe()), name


def test_the_short_forms_are_the_settings_recipes() -> None:
    for short, settings in (
        (recipes.loca, recipes.Loca),
        (recipes.vicregl, recipes.VICRegL),
        (recipes.plain, recipes.Plain),
    ):
        assert describe(short()) == describe(settings().recipe())
        assert describe(short("paper", size=448)) == describe(settings("paper", size=448).recipe())
    assert describe(recipes.evaluation(size=96)) == describe(recipes.Evaluation(size=96).recipe())
    assert recipes.loca().fidelity == "released" and recipes.vicregl().fidelity == "paper"
    cells = [cut.grid for stride in (None, 32, 16) for cut in recipes.vicregl(stride=stride).cuts]
    assert cells == [7, 3, 7, 3, 14, 6]


@pytest.mark.parametrize("method", ["loca", "vicregl"])
def test_a_methods_settings_reach_its_views(method: str) -> None:
    module = methods.load(method)
    config, scales = module.Config(), {"loca": ("scale", "focal_scale"), "vicregl": ("large_scale", "small_scale")}
    changes = {**AUGMENTATION, **dict.fromkeys(scales[method], (0.1, 0.2))}
    changes |= {"blur": (0.2, 0.4, 0.6) if method == "loca" else (0.2, 0.4), "size": 448}
    changes |= {"loca": {"focal_views": 4, "focal_size": 112}, "vicregl": {"small": 2, "small_size": 128}}[method]
    changes["fidelity"] = "paper" if config.views.fidelity == "released" else "released"
    for name, value in changes.items():
        changed = replace(config, views=replace(config.views, **{name: value}))
        assert describe(module.views(changed)) != describe(module.views(config)), name


@pytest.mark.parametrize("rule", ["released", "overlap"])
def test_loca_targets_are_patch_targets_of_its_windows(rule) -> None:
    recipe = recipes.loca(rule=rule)
    seen = windows(recipe)
    for kind, grid, size in (("query", 14, 224), ("focal", 6, 96)):
        expected = patch_targets(
            seen["reference"][:, 0], seen[kind], reference_grid=14, query_grid=grid, query_size=size, rule=rule
        )
        assert np.array_equal(recipe.targets(seen)[kind], expected)


def test_vicregl_has_its_published_views_and_alternating_colours() -> None:
    recipe = recipes.vicregl()
    kinds = [(c.kind, c.count, c.size, c.grid, c.scale, c.interpolation, c.flip) for c in recipe.cuts]
    assert kinds == [
        ("large", 2, 224, 7, (0.4, 1.0), "bicubic", 0.5),
        ("small", 6, 96, 3, (0.08, 0.4), "bicubic", 0.5),
    ]
    for cut in recipe.cuts:
        assert [(c.jitter, c.gray, c.blur, c.solarize) for c in cut.augmentations] == [
            (0.8, 0.2, 1.0, 0.0),
            (0.8, 0.2, 0.1, 0.2),
        ]
    two = recipes.vicregl_resnet50()
    assert [(c.kind, c.count, c.scale) for c in two.cuts] == [("large", 2, (0.08, 1.0))]
    assert two.name == "vicregl_resnet50" and two.targets(windows(two))["matches"].shape == (40, 48, 2)
    assert recipe.std == (0.229, 0.224, 0.225) and recipes.vicregl("released").std == (0.228, 0.224, 0.225)


def test_vicregl_released_ignores_flips_in_its_grids() -> None:
    paper, released = recipes.vicregl(), recipes.vicregl("released")
    seen = windows(paper)
    plain = {kind: unflipped(w) for kind, w in seen.items()}
    assert np.array_equal(paper.targets(seen)["matches"], pair_matches(seen["large"], seen["small"]))
    assert np.array_equal(released.targets(seen)["matches"], pair_matches(plain["large"], plain["small"]))
    assert not np.array_equal(paper.targets(seen)["matches"], released.targets(seen)["matches"])
    asked = recipes.vicregl("released", flip_aware=True)
    assert np.array_equal(asked.targets(seen)["matches"], paper.targets(seen)["matches"])


def test_evaluation_keeps_the_usual_share() -> None:
    (cut,) = recipes.evaluation(size=224, resize=256, interpolation="bicubic").cuts
    assert (cut.scale, cut.flip, cut.sampler, cut.interpolation) == ((0.875, 0.875), 0.0, "centre", "bicubic")
    seen = windows(recipes.evaluation(size=96, resize=96, patch=8))
    assert seen["image"][0, 0].tolist() == [0, 62, 375, 437]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipes.loca("exact"), "fidelity"),
        (lambda: recipes.vicregl("exact"), "fidelity"),
        (lambda: recipes.plain("exact"), "fidelity"),
        (lambda: recipes.loca(patch=14), "96"),
        (lambda: recipes.plain(size=100), "100"),
        (lambda: recipes.evaluation(size=256, resize=224), "resize"),
        (lambda: recipes.loca(jitter=1.5), "'reference': jitter 1.5"),
        (lambda: recipes.loca(blur=(0.5, 0.5)), r"blur is \(0.5, 0.5\): it must hold 3 numbers, for reference, query"),
        (lambda: recipes.loca(strength=(0.4, 0.4, 0.2, 0.6)), "'reference': hue 0.6"),
        (lambda: recipes.loca(focal_views=-1), "'focal': count"),
        (lambda: recipes.loca(sigma=1.0), "'reference': sigma 1.0 must be a pair"),
        (lambda: recipes.loca(rule="nearest"), "rule is 'nearest'"),
        (lambda: recipes.vicregl(gamma=20), "gamma is 20: it must hold 2 numbers"),
        (lambda: recipes.vicregl(blur=(0.5,)), "blur .* for even, odd"),
        (lambda: recipes.vicregl(strength=(0.4,)), "strength .* brightness, contrast, saturation, hue"),
        (lambda: recipes.vicregl(small_scale=(0.4, 0.1)), "'small': scale"),
        (lambda: recipes.vicregl(sigma=(1.0, float("inf"))), "'large': sigma"),
        (lambda: recipes.vicregl(flip=float("nan")), "'large': flip"),
        (lambda: Cut("image", 1, (64, 128), 4), r"'image': size \(64, 128\) .* whole number"),
        (lambda: Cut("image", 1.0, 64, 4), r"'image': count 1.0"),
        (lambda: Cut("image", 1, np.int64(64), 4), r"'image': size np.int64\(64\) must be a positive whole number"),
        (lambda: Cut("image", 1, 64, 4, flip="often"), "'image': flip 'often' must be a number"),
        (lambda: Cut("image", 1, 64, 4, sampler="scaled", short_side=8.5), "'image': short_side 8.5"),
        (lambda: Cut("image", 1, 64, 4, augmentations=(Augmentation(hue=None),)), "'image': hue None must be a number"),
        (lambda: Cut("image", 1, 64, 4, augmentations=Augmentation()), "'image': augmentations must be a tuple"),
        (lambda: Cut("image", 1, 64, 4, scale=0.5), "'image': scale 0.5 must be a pair"),
        (lambda: Cut("image", 1, 64, 4, scale=("a", "b")), "'image': scale .* must be a pair"),
        (lambda: recipes.loca(size=(64, 128)), r"size \(64, 128\) must be a whole number"),
        (lambda: Recipe("mine", "paper", (Cut("image", 1, 64, 4),), targets="x"), "'mine': targets must be a function"),
        (lambda: Recipe("x", "paper", Cut("image", 1, 64, 4)), "'x': cuts must be a tuple"),
        (lambda: Recipe("x", "paper", ()), "'x': cuts must be a tuple"),
        (lambda: Recipe("x", "paper", (Cut("a", 1, 64, 4), Cut("a", 2, 96, 6))), "'x' has two cuts of the kind 'a'"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
