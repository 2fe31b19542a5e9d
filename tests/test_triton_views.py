"""The GPU's kernels in Triton's interpreter on the CPU: equal to the CPU's kernel to one level."""

from dataclasses import replace

import numpy as np
import pytest
import skimage.data
import torch
from mapimages import smooth_image, write_set
from numpy.typing import NDArray
from PIL import Image

from pipeline import Loader, cutting, draws, parameters, recipes
from pipeline.plan import plan
from pipeline.recipes import Augmentation, Cut, Recipe

if torch.cuda.is_available():
    pytest.skip("with a GPU the kernels are compiled for it: gpu_check compares them", allow_module_level=True)

from pipeline.triton_views import cut_batch

Images = list[NDArray[np.uint8]]


def photographs(height: int = 52) -> Images:
    """Two photographs; small ones by default: the interpreter's time grows with what one view's pixel is made of."""
    pictures = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "coffee")]
    sizes = [(height * picture.width // picture.height, height) for picture in pictures]
    return [np.array(picture.resize(size)) for picture, size in zip(pictures, sizes, strict=True)]


def smaller(recipe: Recipe, side: int, count: int = 2) -> tuple[Cut, ...]:
    """Its kinds with few and small views: the interpreter is slow. Two of them keep even and odd colours."""
    return tuple(replace(cut, size=side, count=min(cut.count, count)) for cut in recipe.cuts)


def both(
    cuts: tuple[Cut, ...], images: Images, windows: NDArray[np.float32], params: NDArray[np.float32]
) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """By kind: what `cutting` makes of the images, and what the kernels do."""
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    wanted = [np.empty((len(images), cut.count, cut.size, cut.size, 3), np.uint8) for cut in cuts]
    for b, image in enumerate(images):
        cutting.cut_image(tuple(kind[b] for kind in wanted), image, windows[b], params[b])
    addresses = np.array([image.ctypes.data for image in images])
    planned = {name: torch.from_numpy(array) for name, array in vars(plan(cuts, windows, params, sizes)).items()}
    found = cut_batch(cuts, addresses, planned, torch.device("cpu"))
    return [(a, b.numpy()) for a, b in zip(wanted, found, strict=True)]


def drawn(cuts: tuple[Cut, ...], images: Images, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    return draws.draw(draws.distributions(Recipe("some", "paper", cuts)), seed, 0, np.arange(len(images)), sizes)


def agree(pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]], share: float = 0.02) -> None:
    """To one level, in a share of the values: the CPU's jitter is fixed point, this one is float32."""
    for wanted, found in pairs:
        off = np.abs(wanted.astype(int) - found)
        assert off.max() <= 1
        assert (off > 0).mean() <= share
        assert np.ptp(wanted) > 20  # there is something to compare


@pytest.mark.parametrize(
    "recipe",
    [
        recipes.loca(fidelity="paper"),
        recipes.loca(fidelity="released"),
        recipes.vicregl(),
    ],  # whose fidelities show the same pixels
    ids=lambda r: f"{r.name}-{r.fidelity}",
)
def test_photographs_become_the_cpus_views(recipe: Recipe) -> None:
    cuts, images = smaller(recipe, 28), photographs()
    agree(both(cuts, images, *drawn(cuts, images)))


STRONG = Augmentation(jitter=1, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5, gray=0.3, blur=0.3, solarize=0.4)


@pytest.mark.parametrize("rule", ["torchvision", "tensorflow", "mmseg"])
def test_every_order_of_the_strongest_jitter(rule: str) -> None:
    cut = Cut("strong", 24, 16, 1, augmentations=(replace(STRONG, rule=rule, sigma=(0.1, 1.5)),))
    images = [photographs(20)[1]]
    windows, params = drawn((cut,), images)
    params[0, :, parameters.ORDER] = np.arange(24)
    agree(both((cut,), images, windows, params))


@pytest.mark.parametrize(
    ("interpolation", "antialias"),
    [("bilinear", False), ("bilinear", True), pytest.param("bicubic", True, marks=pytest.mark.slow)],
)
def test_windows_at_every_edge_of_odd_images(interpolation: str, antialias: bool) -> None:
    """One pixel, one row, one column, the whole, each corner, beyond the edge; mirrored or not; enlarged or shrunk."""
    h, w = 37, 53
    boxes = [(0, 0, h, w), (0, 0, 1, 1), (h - 1, w - 1, h, w), (5, 0, 6, w), (0, 7, h, 8), (0, 0, 20, 30)]
    boxes += [(17, 23, h, w), (h - 2, 0, h, w), (-3, -4, h + 5, w + 6), (0, 50, 3, 60)]
    boxes += [(y0, x1, y1, x0) for y0, x0, y1, x1 in boxes]
    cut = Cut("edges", len(boxes), 16, 1, interpolation=interpolation, antialias=antialias)  # type: ignore[arg-type]
    images = [smooth_image(0, h, w)]
    _, params = drawn((cut,), images)
    pairs = both((cut,), images, np.array([boxes], np.float32), params)
    agree(pairs, share=0.0)


def test_tiny_and_long_and_gray_images_share_a_batch() -> None:
    cuts = smaller(recipes.vicregl(), 16, 1)
    gray = np.repeat(photographs(32)[0].mean(-1, keepdims=True).astype(np.uint8), 3, -1)
    images = [smooth_image(1, 1, 1), smooth_image(2, 3, 130), gray]
    windows, params = drawn(cuts, images)
    agree(both(cuts, images, windows, params))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [recipes.loca(fidelity="paper"), recipes.vicregl()], ids=lambda r: r.name)
def test_a_huge_photograph_at_full_size(recipe: Recipe) -> None:
    images = photographs(1500)[:1]
    cuts = smaller(recipe, 96, 1)
    agree(both(cuts, images, *drawn(cuts, images)))


def test_the_loader_hands_out_the_same_batches(tmp_path) -> None:  # type: ignore[no-untyped-def]
    folder = write_set(tmp_path / "set", 4, 2, make=smooth_image, form="JPEG")
    recipe = replace(
        recipes.loca(fidelity="paper"), cuts=smaller(recipes.loca(fidelity="paper"), 96, 1)[1:], targets=None
    )
    loaders = [Loader(folder, recipe, 2, num_threads=1, form=form) for form in ("fused", "triton")]  # type: ignore[arg-type]
    for a, b in zip(*loaders, strict=True):
        assert torch.equal(a.index, b.index)
        for kind, view in a.views.items():
            assert torch.equal(view.window, b.views[kind].window)
            assert (view.pixels.int() - b.views[kind].pixels.int()).abs().max() <= 1
