"""`Loader(pixels=...)`: the u8 loader's views, normalised as torch does; memory in use is never overwritten."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from loaders import facts, loader
from mapimages import SIZES, encode, map_image, smooth_image, write_set
from test_masks import masked
from torch import Tensor

from pipeline import Loader, ShardSet, View, normalise, recipes
from pipeline.buffers import Buffers
from pipeline.recipes import IMAGENET_MEAN, IMAGENET_STD
from pipeline.streams import Stream

TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
RECIPE = recipes.loca("paper", size=64, focal_size=32, focal_views=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("photos"), 12, 2, make=smooth_image, form="JPEG")


@pytest.fixture(scope="module")
def photos(folder: Path) -> ShardSet:
    return ShardSet(folder)


def naive(pixels: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """f32, as torchvision's ToTensor and Normalize do it, one channel after another."""
    channels = [(pixels[..., c].float() / 255 - mean[c]) / std[c] for c in range(3)]
    return torch.stack(channels, dim=2)


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """f32 rounded to the nearest of a 16-bit type, ties to even, by hand: over the two neighbours in float64."""
    rough = x.to(dtype).view(torch.int16).int()
    neighbours = torch.stack([rough - 1, rough, rough + 1]).to(torch.int16)
    distance = (neighbours.view(dtype).double() - x.double()).abs().nan_to_num(torch.inf)
    distance += 1e-30 * (neighbours & 1)  # of two that are as near, the even one
    return neighbours.gather(0, distance.argmin(0, keepdim=True))[0].view(dtype)


@pytest.mark.parametrize("name", TYPES)
def test_every_level_is_rounded_once_to_the_nearest(name: str) -> None:
    dtype = TYPES[name]
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).expand(1, 1, 16, 16, 3)
    found = normalise.normalise(levels.contiguous(), IMAGENET_MEAN, IMAGENET_STD, dtype)
    wanted = naive(levels)
    assert found.dtype == dtype and torch.equal(found, wanted if dtype == torch.float32 else nearest(wanted, dtype))
    assert found.unique().numel() > 300


@pytest.mark.parametrize("form", ["fused", "operators"])
@pytest.mark.parametrize("name", TYPES)
def test_normalised_batches_are_the_u8_ones(photos: ShardSet, name: str, form: str) -> None:
    dtype = TYPES[name]
    for plain, batch in zip(*(loader(photos, 4, RECIPE, form=form, pixels=p) for p in ("uint8", name)), strict=True):
        assert torch.equal(plain.index, batch.index)
        for kind, view in batch.views.items():
            source = plain.views[kind]
            assert view.pixels.dtype == dtype and view.pixels.is_contiguous()
            assert torch.equal(view.pixels, naive(source.pixels).to(dtype))
            assert torch.equal(view.window, source.window)
            assert view.tensor(dtype=dtype) is view.pixels
            assert torch.equal(source.tensor(dtype=dtype), view.pixels)
        assert all(torch.equal(target, plain.targets[name]) for name, target in batch.targets.items())
        shape = f"{name} ({len(batch.index)}, 2, 3, 32, 32)"
        assert f"views['focal']: pixels {shape}, window float32" in repr(batch)


@pytest.mark.slow
def test_the_triton_form_normalises_too(photos: ShardSet) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are compiled for it: gpu_check compares them")
    cut = replace(recipes.loca("released").cuts[2], size=16, count=1)
    recipe = replace(RECIPE, cuts=(cut,), targets=None)
    plain, batch = (next(iter(loader(photos, 1, recipe, form="triton", pixels=p))) for p in ("uint8", "bfloat16"))
    assert torch.equal(batch.views["focal"].pixels, naive(plain.views["focal"].pixels).bfloat16())


def test_a_view_that_is_normalised_already_cannot_be_by_other_numbers(photos: ShardSet) -> None:
    view = next(iter(loader(photos, 4, RECIPE, pixels="float16"))).views["query"]
    assert torch.equal(view.tensor(), view.pixels.float())
    for numbers in (((0.5,) * 3, IMAGENET_STD), (IMAGENET_MEAN, (0.228, 0.224, 0.225))):
        with pytest.raises(ValueError, match=r"normalised already.*pixels='uint8'"):
            view.tensor(*numbers)


def test_a_resumed_loader_may_hand_out_another_type(photos: ShardSet) -> None:
    whole = loader(photos, 4, RECIPE, pixels="bfloat16")
    batches = list(whole) + list(whole)
    source = loader(photos, 4, RECIPE)
    for _ in range(4):
        next(source.forever())
    for name in ("bfloat16", "float32"):
        resumed = loader(photos, 4, RECIPE, pixels=name)
        resumed.load_state_dict(source.state_dict())
        rest = list(resumed)
        assert len(rest) == 2
        for batch, wanted in zip(rest, batches[4:], strict=True):
            assert torch.equal(batch.views["focal"].pixels.bfloat16(), wanted.views["focal"].pixels)


def test_masks_and_streams_and_short_batches(photos: ShardSet, folder: Path, tmp_path: Path) -> None:
    shards = masked(tmp_path)
    recipe = replace(RECIPE, masks=True, targets=None)
    for plain, batch in zip(
        *(loader(shards, 5, recipe, pixels=p, drop_last=False) for p in ("uint8", "float16")), strict=True
    ):
        for kind, view in batch.views.items():
            mask = plain.views[kind].mask
            assert mask is not None and view.mask is not None and torch.equal(view.mask, mask)
            assert torch.equal(view.pixels, naive(plain.views[kind].pixels).half())
    assert len(batch.index) == 2
    ranks = [loader(photos, 5, RECIPE, pixels="float16", rank=r, world_size=3, drop_last=False) for r in range(3)]
    shapes = [tuple(list(rank)[-1].views["focal"].pixels.shape) for rank in ranks]
    assert shapes == [(4, 2, 3, 32, 32)] * 3
    stream = Loader(Stream(str(folder / "map-0000.tar")), RECIPE, 3, num_threads=1, pixels="float32", shuffle=False)
    stored = Loader(photos, RECIPE, 3, num_threads=1, shuffle=False)
    for batch, plain in zip(stream, stored, strict=False):
        assert torch.equal(batch.label, plain.label)
        assert torch.equal(batch.views["query"].pixels, naive(plain.views["query"].pixels))


def test_an_empty_share_has_the_shape_of_a_normalised_one(photos: ShardSet) -> None:
    *_, last = loader(photos, 1, RECIPE, pixels="bfloat16", rank=4, world_size=5, drop_last=False)
    pixels = last.views["focal"].pixels
    assert pixels.shape == (0, 2, 3, 32, 32) and pixels.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["uint8", "bfloat16"])
def test_a_held_batch_is_never_written_over_and_a_dropped_ones_memory_is_used_again(
    photos: ShardSet, name: str
) -> None:
    source = loader(photos, 2, RECIPE, pixels=name)
    fresh = loader(photos, 2, RECIPE, pixels=name)
    places, held, copies = set(), [], []
    for number, batch in zip(range(24), source.forever(), strict=False):
        pixels = batch.views["focal"].pixels
        places.add(pixels.data_ptr())
        if number % 6 == 0:  # held by a piece, a view of another type, an array, another library's tensor
            piece = (pixels[1:], pixels.view(torch.uint8), pixels.view(torch.uint8).numpy(), torch.from_dlpack(pixels))
            held.append(piece[number // 6])
            copies.append(torch.as_tensor(held[-1]).clone())
    assert len(places) <= 4 + 2 + 2 + 1, "a buffer that nobody holds was not used again"
    del batch, pixels, piece, source
    for number, batch in zip(range(24), fresh.forever(), strict=False):
        assert all(torch.equal(torch.as_tensor(a), b) for a, b in zip(held, copies, strict=True))
        if number == 6:
            assert torch.equal(batch.views["focal"].pixels.view(torch.uint8), copies[1])


def test_memory_comes_back_when_the_last_holder_is_gone() -> None:
    buffers = Buffers((3, 8), torch.float16)
    one = buffers.take()
    place, row = one.data_ptr(), one[1]
    del one
    two = buffers.take()
    assert two.data_ptr() != place
    del row
    assert buffers.take().data_ptr() == place
    many = [buffers.take() for _ in range(6)]
    assert len({x.data_ptr() for x in many}) == 6
    many.clear()
    assert len(buffers._free) == 2  # the rest is given back


def test_a_failed_run_takes_no_other_runs_memory(tmp_path: Path) -> None:
    """An image that only a decoder finds to be bad: the batches around it are what they are without it."""
    broken = encode(smooth_image(5, *SIZES[1]))
    middle = len(broken) // 2
    changed = {5: broken[:middle] + bytes(50) + broken[middle + 50 :]}
    shards = ShardSet(write_set(tmp_path / "set", 12, 1, changed, make=smooth_image))
    plain, other = (list(loader(shards, 2, RECIPE, pixels=p, shuffle=False, max_bad=0.5)) for p in ("uint8", "float32"))
    assert len(plain) == len(other) == 6
    for a, b in zip(plain, other, strict=True):
        assert torch.equal(a.index, b.index) and 5 not in b.index
        assert torch.equal(b.views["focal"].pixels, naive(a.views["focal"].pixels))


def test_closing_in_the_middle_leaves_batches_and_goes_on(photos: ShardSet) -> None:
    source = loader(photos, 2, RECIPE, pixels="float16")
    steps = source.forever()
    held = [next(steps) for _ in range(3)]
    before = facts_of(held)
    source.close()
    more = [next(source.forever()) for _ in range(3)]
    assert facts_of(held) == before
    assert facts_of([*held, *more]) == facts_of(list(loader(photos, 2, RECIPE, pixels="float16")))


def facts_of(batches: list) -> dict:
    return facts(
        replace(b, views={k: replace(v, pixels=v.pixels.view(torch.uint8)) for k, v in b.views.items()})
        for b in batches
    )


@pytest.mark.parametrize("value", ["int8", "float", torch.float16, None])
def test_a_type_that_there_is_not_is_named(photos: ShardSet, value: object) -> None:
    with pytest.raises(ValueError, match=r"pixels must be one of \('uint8', 'float16', 'bfloat16', 'float32'\), not"):
        loader(photos, pixels=value)


def test_any_pixels_may_be_normalised_by_any_number_of_threads() -> None:
    pixels = torch.randint(256, (5, 2, 6, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.1, 0.5, 0.9), (0.3, 0.2, 0.1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            for given in (pixels, pixels[::2, :, ::2], pixels.flip(3), pixels[:0]):
                rows = naive(given, mean, std)
                for dtype in (torch.float32, torch.bfloat16, torch.float64):
                    assert torch.equal(View(given, torch.zeros(0)).tensor(mean, std, dtype), rows.to(dtype))
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile traces and guards, but generates no code: seconds less."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    normalise._compiled.cache_clear()
    yield
    normalise._compiled.cache_clear()


@pytest.mark.usefixtures("without_code")
def test_a_gpus_way_is_one_graph_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalise, "_WORDS", {})  # what a device without tables does
    for batch in range(1, 10):  # torch's own limit is 8 graphs
        pixels = torch.from_numpy(np.stack([map_image(k, 8, 8) for k in range(batch)]))[:, None]
        found = normalise.normalise(pixels, IMAGENET_MEAN, IMAGENET_STD, torch.bfloat16, compiled=True)
        assert torch.equal(found, naive(pixels).bfloat16())
