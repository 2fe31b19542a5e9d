"""Label maps are cut like their images: the same windows, the nearest pixel, class indices preserved."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import segmentation_sources as make
import torch
from mapimages import SIZES, coordinates, encode, expected, map_image, still_recipe, write_tar
from numpy.typing import NDArray

from pipeline import Loader, ShardSet, decode_mask, recipes
from pipeline.recipes import Recipe, describe
from pipeline.streams import Stream

RECIPE = replace(still_recipe(size=64, queries=3), masks=True)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def stripes(height: int, width: int) -> NDArray[np.uint8]:
    """Classes in columns and rows of 32 pixels; the last one of a row is ignored."""
    rows, columns = np.mgrid[:height, :width] // 32
    return np.where(columns == columns.max(), 255, 8 * rows + columns).astype(np.uint8)


def members(number: int, mask: bytes | None = None) -> list[tuple[str, bytes]]:
    size = SIZES[number % len(SIZES)]
    mask = encode(stripes(*size)) if mask is None else mask
    return [(f"k{number:02d}.png", encode(map_image(number, *size))), (f"k{number:02d}.seg.png", mask)]


def masked(folder: Path, changed: dict[int, bytes] | None = None, count: int = 12) -> ShardSet:
    return ShardSet(write_tar(folder / "x.tar", [m for k in range(count) for m in members(k, (changed or {}).get(k))]))


def loader(shards: ShardSet, recipe: Recipe = RECIPE, **options: object) -> Loader:
    return Loader(shards, recipe, 4, **{"seed": 3, "num_threads": 1, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["fused", "operators"])
def test_an_edge_of_the_mask_is_where_the_images_is(tmp_path: Path, form: str) -> None:
    shards, flipped = masked(tmp_path), 0
    for batch in loader(shards, form=form):
        for kind, view in batch.views.items():
            assert view.mask is not None and view.mask.dtype == torch.uint8
            assert view.mask.shape == view.pixels.shape[:-1]
            for b, v in np.ndindex(view.window.shape[:2]):
                window, size = view.window[b, v].numpy(), view.pixels.shape[-2]
                labels = stripes(*SIZES[int(batch.index[b]) % len(SIZES)])
                y, x = np.moveaxis(np.floor(expected(window, size)).astype(int), -1, 0)
                assert np.array_equal(view.mask[b, v].numpy(), labels[y, x]), kind
                shown = coordinates(view.pixels[b, v].numpy())  # where the image itself says that its pixels lie
                inside = (np.abs((shown + 16) % 32 - 16) > 1.5).all(axis=-1)  # of an edge's reach
                y, x = np.moveaxis(np.floor(shown[inside]).astype(int), -1, 0)
                assert np.array_equal(view.mask[b, v].numpy()[inside], labels[y, x])
                flipped += window[3] < window[1]
    assert flipped > 10


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("form", ["fused", "operators"])
def test_image_and_mask_of_a_scaled_crop_show_one_place_and_end_together(
    tmp_path: Path, form: str, antialias: bool
) -> None:
    """Also where the crop is larger than the image, and of flipped ones: padding at the bottom and at the right."""
    shards = masked(tmp_path)
    crop = recipes.segmentation(size=64, short_side=48, scale=(0.5, 4), most=1, jitter=0, antialias=antialias)
    kinds = set()
    for batch in loader(shards, crop, form=form):
        view = batch.views["image"]
        assert view.mask is not None
        for b, i in enumerate(batch.index.tolist()):
            height, width = SIZES[i % len(SIZES)]
            pixels, mask, window = view.pixels[b, 0].numpy(), view.mask[b, 0].numpy(), view.window[b, 0].numpy()
            y0, x0, y1, x1 = window.tolist()
            steps = (np.arange(64) + 0.5) / 64
            y, x = y0 + steps * (y1 - y0), x0 + steps * (x1 - x0)
            shown = (y[:, None] < height) & (x < width) & (x > 0)
            step = (y1 - y0) / 64
            padding = (pixels == [124, 116, 104]).all(-1)
            beside = np.minimum(abs(x - width), abs(x)) <= step / 2  # pixels of the border may fall on either side
            sure = ~((abs(y - height) <= step / 2)[:, None] | beside)
            assert np.array_equal(padding[sure], ~shown[sure]) and (mask[padding] == 255).all()
            assert not padding[0, 0]
            seen = coordinates(pixels)
            inner = sure & shown
            inner[[0, -1]] = inner[:, [0, -1]] = False  # where a filter sees one side only
            reach = 1.01 + step / 2
            assert np.abs(seen[..., 0] - y[:, None])[inner].max() <= reach
            assert np.abs(seen[..., 1] - x)[inner].max() <= reach
            truth = stripes(height, width)
            inside = inner & (np.abs((seen + 16) % 32 - 16) > 1.5 + step / 2).all(-1)
            at = np.floor(seen).astype(int)
            assert np.array_equal(mask[inside], truth[at[..., 0][inside], at[..., 1][inside]])
            kinds.add((bool(x1 < x0), bool(padding.any())))
    assert len(kinds) == 4


def test_the_triton_form_refuses_what_it_cannot_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"triton.*use 'operators' or 'fused'"):
        loader(masked(tmp_path), recipes.segmentation(), form="triton")


def test_a_crop_of_one_class_gives_way(tmp_path: Path) -> None:
    """A corner of another class: crops of one class alone are rare where ten windows are tried, and usual else."""
    mask = np.zeros((160, 240), np.uint8)
    mask[:100, :150], mask[:8] = 1, 255
    contents = {"png": encode(map_image(1, 160, 240)), "seg.png": encode(mask)}
    pairs = [(f"k{k}.{name}", content) for k in range(40) for name, content in contents.items()]
    shards = ShardSet(write_tar(tmp_path / "x.tar", pairs))

    def shares(most: float, **options: object) -> list[float]:
        crop = recipes.segmentation(size=64, short_side=160, scale=(1, 1), most=most)
        found = {}
        for batch in loader(shards, crop, **options):
            for i, view, window in zip(
                batch.index.tolist(), batch.views["image"].mask, batch.views["image"].window, strict=True
            ):
                labelled = view[view != 255]
                found[i] = labelled.bincount().max().item() / len(labelled)
                y0, x0, y1, x1 = window[0].int().tolist()
                stored = np.sort(mask[y0:y1, min(x0, x1) : max(x0, x1)].ravel())
                assert np.array_equal(np.sort(view.numpy().ravel()), stored)  # the window handed out is the mask's
        return [found[i] for i in sorted(found)]

    any_, balanced = shares(1), shares(0.75)
    assert np.mean([share < 0.75 for share in any_]) < 0.6
    assert np.mean([share < 0.75 for share in balanced]) > 0.95
    assert balanced == shares(0.75, num_threads=2, prefetch=1)
    kept = [a == b for a, b in zip(any_, balanced, strict=True) if a < 0.75]
    assert all(kept)  # the first window that does is taken


def test_a_loader_without_masks_hands_out_none_and_the_same_views(tmp_path: Path) -> None:
    shards = masked(tmp_path)
    plain = replace(RECIPE, masks=False)
    for batch, other in zip(loader(shards), loader(shards, plain), strict=True):
        for kind, view in batch.views.items():
            assert torch.equal(view.pixels, other.views[kind].pixels)
            assert torch.equal(view.window, other.views[kind].window)
            assert other.views[kind].mask is None
            assert "mask uint8" in repr(batch)
            assert "mask" not in repr(other)
            moved = batch.to("cpu").views[kind].mask
            assert moved is not None and view.mask is not None and torch.equal(moved, view.mask)
    assert describe(plain) != describe(RECIPE)
    with pytest.raises(ValueError, match=r"recipe\.masks"):
        loader(shards).load_state_dict(loader(shards, plain).state_dict())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_indices_are_never_taken_for_colours_or_brightness(bits: int) -> None:
    mask = np.random.default_rng(1).integers(0, 2**bits, (20, 33), np.uint8)
    for data in (encode(mask) if bits == 8 else make.gray_png(mask, bits), make.palette(mask, bits=bits)):
        assert data[24] == bits
        decoded = decode_mask(data)
        assert decoded.dtype == np.uint8 and np.array_equal(decoded, mask)


def test_what_the_sharder_writes_is_what_the_views_show(tmp_path: Path) -> None:
    truth = make.folders(tmp_path / "source")["train"]
    assert make.run(tmp_path / "source", tmp_path / "out", "--layout", "folders", "--split", "train") == 0
    shards = ShardSet(tmp_path / "out", "train")
    whole = replace(recipes.evaluation(size=16, resize=16), masks=True)
    seen = set()
    for batch in Loader(shards, whole, 2, shuffle=False, drop_last=False, num_threads=1):
        view = batch.views["image"]
        for b, i in enumerate(batch.index.tolist()):
            y, x = np.moveaxis(np.floor(expected(view.window[b, 0].numpy(), 16)).astype(int), -1, 0)
            assert view.mask is not None and np.array_equal(view.mask[b, 0].numpy(), truth[shards.key(i)][y, x])
            seen.add(shards.key(i))
    assert seen == set(truth)


def test_bad_masks_are_bad_samples(tmp_path: Path) -> None:
    size = SIZES[0]
    whole = encode(stripes(*size))
    bad = {
        0: (encode(stripes(size[0], size[1] - 1)), "160 x 239 pixels where the image has 160 x 240"),
        4: (encode(np.dstack([stripes(*size)] * 3)), r"its mask has colours \(RGB\)"),
        8: (whole[: len(whole) // 2], "its mask cannot be decoded"),
        12: (encode(stripes(*size).astype(np.uint16)), "its mask has more than 8 bits"),
        16: (b"", "its mask is no PNG$"),
        20: (encode(stripes(*size), "TIFF"), "its mask is no PNG$"),
        24: (encode(np.full_like(stripes(*size), 254)), "its mask has class 254, but classes.txt lists 254"),
    }
    (tmp_path / "classes.txt").write_text("a class\n" * 254)
    shards = masked(tmp_path, {k: mask for k, (mask, _) in bad.items()}, 28)
    source = loader(shards)
    seen = [i for batch in source for i in batch.index.tolist()]
    assert set(source.bad) == set(bad)
    assert not set(seen) & set(bad)
    for k, (_, reason) in bad.items():
        assert re.search(reason, source.bad[k])
    assert not any(loader(shards, replace(RECIPE, masks=False)).bad)


def test_an_image_without_a_mask_is_a_bad_sample_only_where_masks_are_asked_for(tmp_path: Path) -> None:
    shards = ShardSet(write_tar(tmp_path / "x.tar", [m for k in range(8) for m in members(k)[: 1 if k == 5 else 2]]))
    source = loader(shards)
    list(source)
    assert list(source.bad.items()) == [(5, "no mask: its shard has no k05.seg.png")]
    plain = loader(shards, replace(RECIPE, masks=False))
    assert sorted(i for batch in plain for i in batch.index.tolist()) == list(range(8))


def test_a_stream_has_no_masks(tmp_path: Path) -> None:
    path = masked(tmp_path).paths[0]
    with pytest.raises(ValueError, match="asks for masks, which a stream does not have"):
        Loader(Stream(str(path)), RECIPE, 4)


def test_a_crop_for_classification_takes_its_mask_along(tmp_path: Path) -> None:
    recipe = replace(recipes.plain(size=32), masks=True)
    for batch in loader(masked(tmp_path), recipe):
        mask = batch.views["image"].mask
        assert mask is not None and mask.shape == (4, 1, 32, 32)
