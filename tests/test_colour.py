"""The GPU's colour augmentation, run on the CPU: equal to the CPU kernel's to one level, in one graph."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from test_cutting import photograph

from pipeline import colour, cutting, draws, parameters, recipes
from pipeline.recipes import Augmentation, Cut, Recipe

IMAGES, SIDE = 8, 32
RECIPES = [recipes.loca("paper"), recipes.loca("released"), recipes.vicregl(), recipes.segmentation()]


def views(cut: Cut, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Uncoloured pixels, parameters, and the pixels as the kernel colours them, of some images."""
    cut = replace(cut, size=SIDE)
    index, sizes = np.arange(IMAGES), np.full((IMAGES, 2), (70, 80), np.int32)
    windows, params = draws.draw(draws.distributions(Recipe("one", "paper", (cut,))), seed, 0, index, sizes)
    bare = params.copy()
    bare[..., [parameters.GRAY, parameters.SIGMA, parameters.SOLARIZE]] = 0
    bare[..., parameters.ORDER] = -1
    pixels = np.empty((2, IMAGES, cut.count, SIDE, SIDE, 3), np.uint8)
    for i in range(IMAGES):
        for out, p in zip(pixels, (bare, params), strict=True):
            cutting.cut_image((out[i],), photograph(70, 80, i), windows[i], p[i])
    return pixels[0], params, pixels[1]


@pytest.mark.parametrize(
    "cut",
    [cut for r in RECIPES for cut in r.cuts],
    ids=[f"{r.name}-{r.fidelity}-{c.kind}" for r in RECIPES for c in r.cuts],
)
def test_colours_equal_the_kernels_to_one_level(cut: Cut) -> None:
    plain, params, expected = views(cut)
    got = colour.apply(torch.from_numpy(plain), torch.from_numpy(params), cut.augmentations, padded=cut.padded).numpy()
    assert got.dtype == np.uint8 and got.shape == expected.shape
    difference = np.abs(got.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.04  # where fixed point rounds the other way
    assert np.abs(plain.astype(int) - expected).mean() > 5  # there was something to do


def test_each_view_follows_its_own_parameters_alone() -> None:
    plain, params, _ = views(recipes.loca("paper").cuts[2])
    pixels, params, colours = (
        torch.from_numpy(plain),
        torch.from_numpy(params),
        recipes.loca("paper").cuts[2].augmentations,
    )
    whole = colour.apply(pixels, params, colours)
    for b, v in ((0, 0), (IMAGES - 1, 8)):
        alone = colour.apply(pixels[b : b + 1, v : v + 1], params[b : b + 1, v : v + 1], colours)
        assert torch.equal(alone[0, 0], whole[b, v])


def test_nothing_to_do_costs_nothing() -> None:
    pixels = torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8)
    assert colour.apply(pixels, torch.zeros(1, 1, parameters.PARAMS), recipes.plain().cuts[0].augmentations) is pixels


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")  # the cache holds a constant table
@pytest.mark.parametrize("rec", RECIPES[:2], ids=lambda r: f"{r.name}-{r.fidelity}")
def test_it_is_one_graph(rec: Recipe) -> None:
    cut = rec.cuts[-1]
    plain, params, _ = views(cut)
    pixels, params = torch.from_numpy(plain[:2]), torch.from_numpy(params[:2])

    def paint(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return colour.apply(x, p, cut.augmentations, compiled=False)

    graph = torch.compile(paint, fullgraph=True, dynamic=False, backend="eager")
    assert torch.equal(graph(pixels, params), paint(pixels, params))


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile traces and guards, but generates no code: seconds less."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    colour._compiled.cache_clear()
    yield
    colour._compiled.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("without_code")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
def test_any_number_of_forms_can_be_compiled() -> None:
    colours = (Augmentation(solarize=0.5),)
    for count in range(1, 11):  # torch's own limit is 8
        pixels = torch.full((count, 1, 4, 4, 3), 200, dtype=torch.uint8)
        params = torch.zeros(count, 1, parameters.PARAMS)
        params[..., parameters.SOLARIZE] = 1
        assert (colour.apply(pixels, params, colours, compiled=True) == 55).all()


@pytest.mark.slow
def test_compiled_it_says_the_same() -> None:
    cut = recipes.loca("paper").cuts[0]
    plain, params, _ = views(cut)
    pixels, params = torch.from_numpy(plain), torch.from_numpy(params)
    fast = colour.apply(pixels, params, cut.augmentations, compiled=True)
    slow = colour.apply(pixels, params, cut.augmentations, compiled=False)
    assert (fast.int() - slow.int()).abs().max() <= 1


@pytest.mark.gpu
def test_a_gpu_says_the_same() -> None:
    for cut in (recipes.loca("paper").cuts[2], recipes.loca("released").cuts[1], recipes.vicregl().cuts[0]):
        plain, params, expected = views(cut)
        got = colour.apply(torch.from_numpy(plain).cuda(), torch.from_numpy(params).cuda(), cut.augmentations)
        assert np.abs(got.cpu().numpy().astype(int) - expected).max() <= 1
