"""The loader's guarantees: everything random follows from (seed, epoch, sample, view); nothing else changes a batch."""

import gc
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from loaders import RECIPE, N, epochs, facts, loader
from mapimages import coordinates, expected, smooth_image, still_recipe, write_set

from pipeline import ShardSet, recipes
from pipeline.recipes import Recipe


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    return ShardSet(write_set(tmp_path_factory.mktemp("set"), N, 3))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet(write_set(tmp_path_factory.mktemp("photos"), 12, 2, make=smooth_image, form="JPEG"))


def test_a_batch_is_what_the_contract_says(photos: ShardSet) -> None:
    source = loader(photos, 3, recipes.loca("paper"), seed=0)
    assert len(source) == 4
    batch = next(iter(source))
    shapes = {kind: (tuple(v.pixels.shape), tuple(v.window.shape)) for kind, v in batch.views.items()}
    assert shapes == {
        "reference": ((3, 1, 224, 224, 3), (3, 1, 4)),
        "query": ((3, 1, 224, 224, 3), (3, 1, 4)),
        "focal": ((3, 9, 96, 96, 3), (3, 9, 4)),
    }
    assert all(v.pixels.dtype == torch.uint8 and v.window.dtype == torch.float32 for v in batch.views.values())
    assert all(v.pixels.is_contiguous() and v.window.is_contiguous() for v in batch.views.values())
    assert {k: (tuple(t.shape), t.dtype) for k, t in batch.targets.items()} == {
        "query": ((3, 1, 196), torch.int32),
        "focal": ((3, 9, 36), torch.int32),
    }
    assert batch.label.dtype == batch.index.dtype == torch.int64
    assert batch.label.tolist() == [i % 7 for i in batch.index.tolist()]
    assert photos.key(int(batch.index[0])) == f"image-{int(batch.index[0]):05d}"


def test_pixels_windows_and_samples_belong_together(shards: ShardSet) -> None:
    """From file to batch: each pixel's colour is the place that the window names, in the image that the index names."""
    flips = []
    for batch in loader(shards):
        for view in batch.views.values():
            size = view.pixels.shape[2]
            for b, i in enumerate(batch.index.tolist()):
                for v in range(view.pixels.shape[1]):
                    window, pixels = view.window[b, v].numpy(), view.pixels[b, v].numpy()
                    assert (pixels[..., 2] == i).all()
                    assert np.abs(coordinates(pixels) - expected(window, size)).max() <= 1.01
                    flips.append(window[3] < window[1])
    assert 0.3 < np.mean(flips) < 0.7


@pytest.mark.parametrize("rule", ["released", "overlap"])
def test_targets_name_the_patch_that_shows_the_same_place(shards: ShardSet, rule: str) -> None:
    """Judged by the pixels alone: a query patch's middle lies within half a patch of the reference patch it names.

    Both rules may choose a neighbour: `released` samples half a view's pixel beside the middle, `overlap` the largest
    overlap, so a middle may lie half a query patch further out.
    """
    recipe = recipes.loca("paper", size=64, focal_size=32, focal_views=3, rule=rule)
    recipe = Recipe("still", "paper", tuple(_still(cut) for cut in recipe.cuts), targets=recipe.targets)
    inside = outside = 0
    for batch in loader(shards, 6, recipe):
        for b in range(6):
            reference = _middles(batch.views["reference"].pixels[b, 0], 4)
            size = np.abs(np.diff(batch.views["reference"].window[b, 0].numpy().reshape(2, 2), axis=0))[0] / 4
            for kind, grid in (("query", 4), ("focal", 2)):
                for v in range(batch.targets[kind].shape[1]):
                    middles = _middles(batch.views[kind].pixels[b, v], grid)
                    window = batch.views[kind].window[b, v].numpy()
                    own = np.abs(window[2:] - window[:2]) / grid
                    slack = 1.5 + (own / 16 if rule == "released" else own / 2)
                    for middle, target in zip(middles, batch.targets[kind][b, v].tolist(), strict=True):
                        distance = np.abs(reference - middle)
                        if target >= 0:
                            assert (distance[target] <= size / 2 + slack).all()
                            inside += 1
                        else:
                            assert (distance > size / 2 - slack).any(axis=1).all()
                            outside += 1
    assert inside > 500
    assert outside > 50


def _still(cut: recipes.Cut) -> recipes.Cut:
    still = next(c for c in still_recipe().cuts)
    return recipes.Cut(
        **{
            **{f: getattr(cut, f) for f in cut.__dataclass_fields__},
            "augmentations": still.augmentations,
            "antialias": False,
        }
    )


def _middles(pixels: torch.Tensor, grid: int) -> np.ndarray:
    """(grid * grid, 2): the place that the middle of each patch shows, between its four middle pixels."""
    places = coordinates(pixels.numpy())
    step = len(places) // grid
    middle = np.arange(grid) * step + step // 2
    corners = [places[np.ix_(middle - dy, middle - dx)] for dy in (0, 1) for dx in (0, 1)]
    return np.mean(corners, axis=0).reshape(-1, 2)


def test_an_epoch_is_a_permutation_and_the_next_one_another(shards: ShardSet) -> None:
    one, two = epochs(loader(shards), 2)
    for epoch in (one, two):
        assert sorted(i for _, i in epoch) == list(range(N))
    assert [i for _, i in one] != [i for _, i in two]
    assert not set(one.values()) & set(two.values())  # other windows, too


def test_batch_size_threads_and_form_do_not_matter(photos: ShardSet) -> None:
    recipe = recipes.loca("paper", size=64, focal_size=32, focal_views=2)
    wanted = epochs(loader(photos, 4, recipe), 2)
    for options in ({"batch_size": 2}, {"batch_size": 6, "num_threads": 2}, {"batch_size": 12, "num_threads": 3}):
        assert epochs(loader(photos, recipe=recipe, **options), 2) == wanted  # type: ignore[arg-type]
    windows = [[b.views["focal"].window for b in loader(photos, 4, recipe, form=f)] for f in ("fused", "operators")]
    assert all(torch.equal(a, b) for a, b in zip(*windows, strict=True))
    assert epochs(loader(photos, 4, recipe, seed=6), 1)[0] != wanted[0]


@pytest.mark.parametrize("order", ["global", "block"])
def test_ranks_share_what_one_process_would_see(shards: ShardSet, order: str) -> None:
    """World sizes 1, 2, 4, 8 with a global batch of 8: the k-th batches together are the same samples, cut the same."""
    whole = [facts([batch]) for batch in loader(shards, 8, order=order)]
    assert len(whole) == 3
    for world in (2, 4, 8):
        ranks = [list(loader(shards, 8 // world, rank=r, world_size=world, order=order)) for r in range(world)]
        assert {len(batches) for batches in ranks} == {3}
        for k, wanted in enumerate(whole):
            parts = [facts([batches[k]]) for batches in ranks]
            assert {i: h for part in parts for (_, i), h in part.items()} == {i: h for (_, i), h in wanted.items()}
            assert sum(len(part) for part in parts) == 8


def test_what_an_epoch_leaves_out_differs_from_the_next(shards: ShardSet) -> None:
    source = loader(shards, 5)
    left = [set(range(N)) - {i for _, i in facts(source)} for _ in range(6)]
    assert {len(missing) for missing in left} == {4}
    assert len({frozenset(missing) for missing in left}) == 6


def test_numbers_may_be_numpys(shards: ShardSet) -> None:
    wanted = facts(loader(shards, 4, seed=5))
    assert facts(loader(shards, np.int64(4), seed=np.int64(5), rank=np.int32(0), world_size=np.int64(1))) == wanted
    json.dumps(loader(shards, seed=np.int64(5)).state_dict())
    for options in ({"batch_size": 4.5}, {"prefetch": 1.5}, {"num_threads": "2"}):
        with pytest.raises(TypeError, match=f"{next(iter(options))} .* must be a whole number"):
            loader(shards, **options)


def test_evaluation_sees_all_in_order(shards: ShardSet) -> None:
    source = loader(shards, 5, shuffle=False, drop_last=False)
    batches = list(source)
    assert len(batches) == len(source) == 5
    assert torch.cat([b.index for b in batches]).tolist() == list(range(N))
    assert batches[-1].views["focal"].pixels.shape[0] == 4
    assert source.epoch == 1
    assert len(list(source)) == 5


@pytest.mark.parametrize(("world", "batch_size"), [(2, 5), (4, 4), (3, 7), (5, 4)])
def test_evaluation_on_ranks_takes_equal_steps(shards: ShardSet, world: int, batch_size: int) -> None:
    options = {"shuffle": False, "drop_last": False, "world_size": world}
    ranks = [list(loader(shards, batch_size, rank=r, **options)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = torch.cat([b.index for batches in ranks for b in batches]).tolist()
    assert sorted(seen) == list(range(N))
    for batches in ranks:
        for view in batches[-1].views.values():
            assert view.pixels.shape[0] == view.window.shape[0] == batches[-1].index.shape[0]


def test_batches_stay_as_they_were(shards: ShardSet) -> None:
    source = loader(shards)
    held = [batch for _ in range(3) for batch in source]
    before = [facts([batch]) for batch in held]
    fresh = loader(shards)
    assert before == [facts([batch]) for _ in range(3) for batch in fresh]
    del source, fresh
    gc.collect()
    assert before == [facts([batch]) for batch in held]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(photos: ShardSet) -> None:
    pairs = zip(*(loader(photos, recipe=recipes.loca("paper"), device=d) for d in ("cuda:0", "cuda:1")), strict=True)
    for one, other in pairs:
        for kind, view in other.views.items():
            assert view.pixels.device.index == 1
            assert torch.equal(view.pixels.cpu(), one.views[kind].pixels.cpu())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
        ({"batch_size": 25}, "24 samples do not fill"),
        ({"seed": -1}, "seed"),
        ({"order": "random"}, "order"),
        ({"form": "both"}, "form"),
        ({"num_threads": 0}, "num_threads"),
        ({"prefetch": 0}, "prefetch 0"),
        ({"num_threads": 100_000}, "num_threads 100000"),
        ({"max_bad": 2.0}, "max_bad"),
        ({"hw_decoder_load": 65}, "hw_decoder_load"),
        ({"device": "mps"}, "device"),
        ({"device": "tpu"}, "device"),
        pytest.param(
            {"device": "cuda"}, "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has one")
        ),
    ],
)
def test_bad_numbers_are_named(shards: ShardSet, options: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        loader(shards, **options)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "'still' returned NoneType"),
        ({"places": np.zeros((3, 2), np.int32)}, r"'places' of recipe 'still' has shape \(3, 2\).* 4 images"),
        ({"places": np.int32(0)}, r"'places' .*shape \(\)"),
        ({"places": np.array(["a"] * 4)}, r"'places' .*holds <U1.* numbers"),
    ],
)
def test_targets_that_are_none_of_the_batch_are_refused(shards: ShardSet, found: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        next(iter(loader(shards, recipe=replace(RECIPE, targets=lambda _: found))))


def test_targets_may_write_on_the_windows_they_get(shards: ShardSet) -> None:
    """Of a recipe with one kind of view, too."""

    def relative(windows: dict) -> dict:
        windows["query"] /= 256
        return {"flipped": windows["query"][..., ::-1], "one": np.broadcast_to(np.int32(1), (4, 1))}

    recipe = Recipe("mine", "paper", RECIPE.cuts[1:2], relative)
    for batch in loader(shards, recipe=recipe):
        window = batch.views["query"].window
        assert window.max() > 1 and torch.equal(batch.targets["flipped"], window.flip(-1) / 256)
        batch.targets["one"] += 1


@pytest.mark.parametrize("recipe", [None, "loca", recipes.loca, recipes.Loca()])
def test_what_is_no_recipe_is_named(shards: ShardSet, recipe: object) -> None:
    with pytest.raises(TypeError, match=r"recipe must be a Recipe, as recipes\.loca\(\) makes one, not "):
        loader(shards, recipe=recipe)  # type: ignore[arg-type]


def test_the_measure_of_shuffling(shards: ShardSet) -> None:
    quality = loader(shards).shuffle_quality()
    assert set(quality) == {"spread", "shards"}
    assert loader(shards, shuffle=False).shuffle_quality()["spread"] < 0.2 < quality["spread"]
