"""Pixels: both forms of the graph show the parts in the windows, in the order of submission."""

import io
import warnings

import numpy as np
import pytest
import torch
from mapimages import SIZES, coordinates, encode, expected, map_image, smooth_image, still_recipe
from numba import types as numba_types
from numpy.typing import NDArray
from nvidia import dali
from nvidia.dali import types
from nvidia.dali.plugin.numba import NumbaFunction
from PIL import Image

from pipeline import colour, draws, graph, recipes, tuning
from pipeline.graph import DecodeError, Graph
from pipeline.recipes import Augmentation, Cut, Recipe

FORMS = ("fused", "operators")


def stored(*files: bytes) -> list[NDArray[np.uint8]]:
    return [np.frombuffer(data, np.uint8) for data in files]


def drawn(recipe: Recipe, sizes: list[tuple[int, int]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return draws.draw(draws.distributions(recipe), 3, 0, np.arange(len(sizes)), np.array(sizes, np.int32))


def sizes_of(images: list[NDArray[np.uint8]]) -> NDArray[np.int32]:
    return np.array([Image.open(io.BytesIO(image.tobytes())).size[::-1] for image in images], np.int32)


def views(form: str, recipe: Recipe, images: list[NDArray[np.uint8]], windows: NDArray, params: NDArray) -> list:
    g = Graph(recipe, len(images), form=form)  # type: ignore[arg-type]
    g.submit(images, windows, params, sizes_of(images))
    return [torch.from_dlpack(kind).numpy() for kind in g.take()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("antialias", "interpolation"), [(False, "bilinear"), (True, "bilinear"), (True, "bicubic")])
def test_each_pixel_shows_the_place_that_the_window_says(form: str, antialias: bool, interpolation: str) -> None:
    """Away from a window's edge to a level; at it, where filters see one side only, to the filter's half width."""
    recipe = still_recipe(antialias, interpolation)
    sizes = [SIZES[k % 4] for k in range(8)]
    windows, params = drawn(recipe, sizes)
    images = stored(*(encode(map_image(k, *size)) for k, size in enumerate(sizes)))
    flips = 0
    view = 0
    for cut, kind in zip(recipe.cuts, views(form, recipe, images, windows, params), strict=True):
        for v in range(cut.count):
            for b in range(len(images)):
                window = windows[b, view]
                flips += window[3] < window[1]
                seen, wanted = coordinates(kind[b, v]), expected(window, cut.size)
                inner = slice(2, -2)
                assert np.abs(seen - wanted)[inner, inner].max() <= 1.01
                scale = max(window[2] - window[0], abs(window[3] - window[1])) / cut.size
                assert np.abs(seen - wanted).max() <= 1.01 + (scale if antialias else 0)
                assert (kind[b, v][..., 2] == b).all()
            view += 1
    assert 5 < flips < 35


@pytest.mark.parametrize("name", ["bilinear", "antialiased", "bicubic", "loca", "vicregl", "segmentation"])
def test_both_forms_agree(name: str) -> None:
    """Geometry within 3 levels, 1 for 99 % of the bytes; with colours, which amplify it, within 4 for 99.9 %."""
    still = {"bilinear": (False, "bilinear"), "antialiased": (True, "bilinear"), "bicubic": (True, "bicubic")}
    recipe = still_recipe(*still[name]) if name in still else getattr(recipes, name)()
    sizes = [SIZES[k % 4] for k in range(4)]
    windows, params = drawn(recipe, sizes)
    images = stored(*(encode(smooth_image(k, *size), "JPEG", quality=95) for k, size in enumerate(sizes)))
    fused, operators = (views(form, recipe, images, windows, params) for form in FORMS)
    done = 0
    for cut, one, other in zip(recipe.cuts, fused, operators, strict=True):
        drawn_here = torch.from_numpy(params[:, done : done + cut.count])
        painted = colour.apply(torch.from_numpy(other), drawn_here, cut.augmentations, padded=cut.padded)
        done += cut.count
        difference = np.abs(one.astype(int) - painted.numpy().astype(int))
        if name in still:
            assert difference.max() <= 3
            assert np.quantile(difference, 0.99) <= 1
        else:
            assert np.quantile(difference, 0.999) <= 4
        assert np.ptp(one) > 100  # there is something to compare


@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_kinds(form: str) -> None:
    for kinds in (1, 2, 4, 6):
        cuts = tuple(Cut(f"k{k}", k + 1, 16 * (k + 1), 1, augmentations=(Augmentation(),)) for k in range(kinds))
        recipe = Recipe("many", "paper", cuts)
        windows, params = drawn(recipe, [(50, 60)] * 3)
        images = stored(*(encode(map_image(k, 50, 60)) for k in range(3)))
        out = views(form, recipe, images, windows, params)
        assert [kind.shape for kind in out] == [(3, c.count, c.size, c.size, 3) for c in cuts]
        assert all((kind[b, ..., 2] == b).all() for kind in out for b in range(3))


def odd_images() -> dict[str, bytes]:
    photo = Image.fromarray(smooth_image(2, 90, 120))
    return {
        "progressive": encode(photo, "JPEG", progressive=True),
        "gray": encode(photo.convert("L"), "JPEG"),
        "cmyk": encode(photo.convert("CMYK"), "JPEG"),
        "odd chroma": encode(photo, "JPEG", subsampling="4:1:1"),
        "no chroma subsampling": encode(photo, "JPEG", subsampling="4:4:4"),
        "png": encode(photo, "PNG"),
        "palette png": encode(photo.quantize(64), "PNG"),
        "webp": encode(photo, "WEBP"),
        "turned by exif": encode(photo, "JPEG", exif=_turned()),
    }


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


@pytest.mark.parametrize(("name", "data"), odd_images().items(), ids=odd_images().keys())
def test_whatever_is_stored_becomes_what_pillow_makes_of_it(name: str, data: bytes) -> None:
    recipe = Recipe("whole", "paper", (Cut("whole", 1, 90, 1, augmentations=(Augmentation(),)),))
    window = np.array([[[0, 15, 90, 105]]], np.float32)  # 90 x 90 pixels as they are
    params = drawn(recipe, [(90, 120)])[1]
    (out,) = views("fused", recipe, stored(data), window, params)
    with Image.open(io.BytesIO(data)) as opened:
        wanted = np.asarray(opened.convert("RGB"))[:, 15:105]
    assert np.abs(out[0, 0].astype(int) - wanted).max() <= 1


@pytest.mark.parametrize(("name", "data"), odd_images().items(), ids=odd_images().keys())
def test_what_no_view_shows_need_not_be_decoded(name: str, data: bytes) -> None:
    """A view is the same, byte for byte, whether another one shows the rest of the image or nobody does."""
    look = {"augmentations": (Augmentation(),), "interpolation": "bicubic"}
    alone, beside = Cut("part", 2, 32, 1, **look), Cut("whole", 1, 16, 1, **look)  # type: ignore[arg-type]
    rng = np.random.default_rng(2)
    for _ in range(6):
        low, high = np.sort(rng.choice(89, (2, 2), replace=False), axis=0)
        parts = [(low[0], low[1], high[0] + 1, high[1] + 20), (low[0], high[1] + 9, high[0] + 1, low[1])]
        windows = np.array([[*parts, (0, 0, 90, 120)]], np.float32)
        params = np.repeat(drawn(Recipe("one", "paper", (alone,)), [(90, 120)])[1][:, :1], 3, axis=1)
        (part,) = views("fused", Recipe("one", "paper", (alone,)), stored(data), windows[:, :2], params[:, :2])
        both, _ = views("fused", Recipe("two", "paper", (alone, beside)), stored(data), windows, params)
        assert np.array_equal(part, both)
        assert np.ptp(part) > 10


def test_the_region_is_the_windows_union_inside_the_image() -> None:
    whole = encode(smooth_image(0, 60, 80), "JPEG")
    windows = np.array([[(10, 70, 20, 30), (14.5, 40, 33.2, 60)], [(-5, -5, 70, 90)] * 2, [(9, 9, 12, 12)] * 2])
    images = stored(whole, whole, whole[:-400])
    start, shape = graph._regions(images, windows.astype(np.float32), np.array([(60, 80)] * 3, np.int32))
    assert start.tolist() == [[10, 30], [0, 0], [0, 0]]
    assert shape.tolist() == [[24, 40], [60, 80], [60, 80]]  # of what breaks off, all
    nearly = np.array([[(5, 3, 40, 70)]], np.float32)  # 67 of 80 columns: all of them
    start, shape = graph._regions(images[:1], nearly, np.array([(60, 80)], np.int32))
    assert (start.tolist(), shape.tolist()) == ([[5, 0]], [[35, 80]])


def test_a_file_that_breaks_off_fails_wherever_it_is_looked_at() -> None:
    data = encode(smooth_image(0, 200, 300), "JPEG")
    recipe = Recipe("one", "paper", (Cut("top", 1, 16, 1, augmentations=(Augmentation(),)),))
    params = drawn(recipe, [(200, 300)])[1]
    g, half = Graph(recipe, 1), stored(data[: len(data) // 2])
    for window in ((0, 0, 30, 300), (150, 0, 200, 300)):
        g.submit(half, np.array([[window]], np.float32), params, np.array([(200, 300)], np.int32))
        with pytest.raises(DecodeError):
            g.take()


@pytest.mark.parametrize("form", FORMS)
def test_a_failing_run_fails_alone(form: str) -> None:
    recipe = still_recipe()
    g = Graph(recipe, 3, form=form)  # type: ignore[arg-type]
    windows, params = drawn(recipe, [(64, 64)] * 3)
    sizes = np.full((3, 2), 64, np.int32)
    good = [stored(*(encode(map_image(10 * run + k, 64, 64)) for k in range(3))) for run in range(4)]
    whole = encode(smooth_image(0, 64, 64), "JPEG")
    for k, images in enumerate(good):
        g.submit(images, windows, params, sizes)
        if k == 1:
            g.submit([*images[:2], np.frombuffer(whole[:300], np.uint8)], windows, params, sizes)
            g.submit([np.frombuffer(b"no image at all, only text", np.uint8), *images[:2]], windows, params, sizes)
    held = []
    for k in range(6):
        if k in (2, 3):
            with pytest.raises(DecodeError) as caught:
                g.take()
            assert "Traceback" not in str(caught.value)
        else:
            held.append(torch.from_dlpack(g.take()[0]))
    for run, pixels in enumerate(held):  # held over all later runs
        assert [pixels[b, ..., 2].unique().tolist() for b in range(3)] == [[10 * run + b] for b in range(3)]


def test_an_image_is_tried_alone() -> None:
    g = Graph(still_recipe(), 4, num_threads=3)
    data = encode(smooth_image(0, 60, 80), "JPEG")
    assert g.decode_one(np.frombuffer(data, np.uint8)) == (60, 80)
    for bad in (data[: len(data) // 2], data[:100], b"<html>", bytes(1000)):
        with pytest.raises(DecodeError):
            g.decode_one(np.frombuffer(bad, np.uint8))
    assert g.decode_one(np.frombuffer(data, np.uint8)) == (60, 80)
    assert (g._pipe.num_threads, g._single.num_threads) == (3, 1)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["loca", "vicregl", "vicregl_resnet50", "plain", "segmentation"])
def test_the_gpu_has_every_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's graph can be written down without a GPU; each operator is looked up for the device it is asked on."""
    asked = set()
    call = graph._call

    def spy(schema: str, device: str, *rest: object, **options: object) -> object:
        asked.add((schema, device))
        return call(schema, device, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(graph, "_call", spy)
    g = Graph(getattr(recipes, name)(), 4, device_id=0, hw_decoder_load=0.5)
    assert asked == {
        ("ExternalSource", "cpu"),
        ("decoders__Image", "mixed"),
        ("Slice", "gpu"),
        ("Resize", "gpu"),
        ("Stack", "gpu"),
    }
    # ... and nothing else is in the graph as DALI has it: no subscripts, which it would run one at a time on the host.
    g._pipe._build_graph()
    specs = [str(op.spec) for op in g._pipe._ops]
    found = {(_after("OpSpec for ", spec).rstrip(":"), _after("device: ", spec)) for spec in specs}
    assert found == asked
    registered = {
        "cpu": graph.backend.RegisteredCPUOps(),
        "gpu": graph.backend.RegisteredGPUOps(),
        "mixed": graph.backend.RegisteredMixedOps(),
    }
    assert all(schema in registered[device] for schema, device in found)
    assert {output.device for output in g._pipe._graph_outputs} == {"gpu"}  # nothing passes through the host
    (decoder,) = [spec for spec in specs if "OpSpec for decoders__Image" in spec]
    assert float(_after("hw_decoder_load: ", decoder)) == 0.5


@pytest.mark.parametrize(("form", "nodes"), [("operators", 71), ("fused", 7), ("triton", 2)])
def test_dali_knows_what_the_gpus_graph_asks_of_it(form: str, nodes: int) -> None:
    """By its own registry, without a GPU: operators, arguments, where inputs lie. Nothing is decoded twice or in vain.

    Fused: only copies are the GPU's. Triton: only decoding is DALI's.
    """
    g = Graph(recipes.loca(), 4, device_id=0, form=form)  # type: ignore[arg-type]
    g._pipe._build_graph()
    assert len(g._pipe._ops) == nodes
    decoders = []
    for operator in g._pipe._ops:
        spec, text = operator.spec, str(operator.spec)
        name, device = _after("OpSpec for ", text).rstrip(":"), _after("device: ", text)
        schema = graph.backend.GetSchema(name)
        if name.startswith("decoders__Image"):
            decoders.append(device)
            assert not schema.HasArgument("num_threads")  # or docs/gpu.md would say how many it should have
        arguments = {line.split(":")[0].strip() for line in text.partition("Arguments:")[2].splitlines() if ":" in line}
        known = {"device", "preserve_name"} | {a for a in arguments if a.startswith("_") or schema.HasArgument(a)}
        assert arguments <= known, f"{name} has no {arguments - known}"
        regular = spec.NumRegularInput()
        fed = [spec.InputDevice(i) for i in range(spec.NumInput())]
        assert set(fed[:regular]) <= {"gpu" if device == "gpu" else "cpu"}, f"{name} takes {fed}"
        assert set(fed[regular:]) <= {"cpu"}, f"{name}: GPU operators read their arguments on the host"
    assert decoders == (["cpu"] if form == "fused" else ["mixed"])
    assert {output.device for output in g._pipe._graph_outputs} == {"gpu"}


def decoder(g: Graph) -> str:
    """Its specification, as DALI has it."""
    g._pipe._build_graph()
    (found,) = [str(op.spec) for op in g._pipe._ops if "OpSpec for decoders__Image" in str(op.spec)]
    return found


@pytest.mark.parametrize("form", ["operators", "triton"])
@pytest.mark.parametrize(("fastest", "by", "taken"), [(0.25, 0.9, 0.25), (0.8, 0.98, None)])
def test_the_share_of_the_jpeg_engines_is_found_out(
    form: str, fastest: float, by: float, taken: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI's own stays unless another is worth it; a batch that cannot be decoded leaves it to the next one."""
    images = stored(encode(smooth_image(0, 60, 80), "JPEG"))
    g = Graph(still_recipe(), 4, device_id=0, form=form, largest=(375, 500))  # type: ignore[arg-type]
    tried: list[float] = []

    def seconds(self: Graph, share: float, batch: list[NDArray[np.uint8]]) -> float:
        tried.append(share)
        if len(tried) == 2:
            raise RuntimeError("an image of the first batch is damaged")
        return by if share == fastest else 1.0

    monkeypatch.setattr(Graph, "_seconds", seconds)
    g._tune(images)
    assert g._tunes and "hw_decoder_load" not in decoder(g)
    g._tune(images)
    assert not g._tunes and set(tried[2:]) == set(tuning.SHARES)
    assert (float(_after("hw_decoder_load: ", decoder(g))) if taken else None) == taken
    assert [_after(f"preallocate_{side}_hint: ", decoder(g)) for side in ("height", "width")] == ["375", "500"]
    assert len(g._pipe._graph_outputs) == (1 if form == "triton" else len(still_recipe().cuts))


def test_runs_under_way_stay_those_that_were_submitted_when_tuning_changes_the_pipeline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first batch cannot be timed, the second is while the first is still in the old pipeline's hands."""
    recipe, tried = still_recipe(), []
    windows, params = drawn(recipe, [(64, 70)])
    images = [stored(encode(smooth_image(k, 64, 70))) for k in range(2)]

    def seconds(self: Graph, share: float, batch: list[NDArray[np.uint8]]) -> float:
        tried.append(share)
        if len(tried) == 1:
            raise RuntimeError("damaged")
        return 1.0 - share

    monkeypatch.setattr(Graph, "_seconds", seconds)
    g = Graph(recipe, 1, form="operators")
    g._tunes, before = 3, g._pipe
    for image in images:
        g.submit(image, windows, params, np.array([[64, 70]], np.int32))
    assert g._pipe is not before
    found = [[torch.from_dlpack(kind).numpy() for kind in g.take()] for _ in images]
    for image, batch in zip(images, found, strict=True):
        wanted = views("operators", recipe, image, windows, params)
        assert all(np.array_equal(a, b) for a, b in zip(batch, wanted, strict=True))


def test_memory_that_dali_may_write_into_lives_as_long_as_its_pipeline() -> None:
    """A traceback of an interrupted run holds the pipeline beyond `close`."""
    recipe = still_recipe()
    windows, params = drawn(recipe, [(64, 70)])
    g = Graph(recipe, 1)
    held, memory = g._pipe, g._under_way
    g.submit(stored(encode(smooth_image(0, 64, 70))), windows, params, np.array([[64, 70]], np.int32))
    g.close()
    assert len(memory) == 1
    del held
    assert not memory


def test_a_batch_is_timed_and_nothing_is_tuned_that_is_given_or_on_a_cpu() -> None:
    images = stored(encode(smooth_image(0, 60, 80), "JPEG"), encode(smooth_image(1, 60, 80), "JPEG"))
    g = Graph(still_recipe(), 2, form="operators")
    assert 0 < g._seconds(0.65, images) < 60
    with pytest.raises(RuntimeError):
        g._seconds(0.65, [images[0], np.frombuffer(b"no image", np.uint8)])
    forms = {"cpu": {}, "fused": {"device_id": 0, "form": "fused"}, "given": {"device_id": 0, "hw_decoder_load": 0.5}}
    assert not any(Graph(still_recipe(), 2, **settings)._tunes for settings in forms.values())  # type: ignore[arg-type]
    assert Graph(still_recipe(), 2, device_id=0)._tunes


def _after(words: str, text: str) -> str:
    return text.partition(words)[2].split()[0]


def test_a_missing_kernel_is_found_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = set(graph.backend.RegisteredGPUOps()) - {"Resize"}
    monkeypatch.setattr(graph.backend, "RegisteredGPUOps", lambda: registered)
    with pytest.raises(NotImplementedError, match="no Resize for 'gpu'"):
        Graph(still_recipe(), 4, device_id=0)


def test_another_way_of_calling_numba_operators_is_noticed_and_said_once(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(graph._fits.cache_clear)
    graph._fits.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Graph(still_recipe(), 4).form == "fused"  # with the DALI that is installed here
    monkeypatch.setattr(NumbaFunction, "_run_fn_sig", lambda self, batch: numba_types.void(numba_types.uint64))
    for change in (lambda: None, lambda: monkeypatch.delattr(NumbaFunction, "_setup_fn_sig")):
        change()
        graph._fits.cache_clear()
        with pytest.warns(UserWarning, match="several times slower on a CPU") as warned:
            assert [Graph(still_recipe(), 4).form for _ in range(2)] == ["operators"] * 2
        assert len(warned) == 1


def test_views_for_a_gpu_are_left_in_dalis_memory() -> None:
    """What a GPU's fused graph copies, put out on the CPU: the same bytes as in memory of our own."""
    recipe = still_recipe()
    windows, params = drawn(recipe, [(64, 70)] * 3)
    images = stored(*(encode(smooth_image(k, 64, 70)) for k in range(3)))
    pipe = dali.Pipeline(batch_size=3, num_threads=1, device_id=None, exec_dynamic=True, prefetch_queue_depth=1)
    with pipe:
        image = graph._decode(graph._source("image", types.DALIDataType.UINT8, 1), False, None)
        drawings = [graph._source(name, types.DALIDataType.FLOAT, 2) for name in ("windows", "params")]
        pipe.set_outputs(*graph._fused(recipe.cuts, gpu=True)(image, *drawings))
    for name, content in (("image", images), ("windows", windows), ("params", params)):
        pipe.feed_input(name, content)
    pipe.schedule_run()
    theirs = [torch.from_dlpack(kind.as_tensor()).numpy() for kind in pipe.outputs()]
    ours = views("fused", recipe, images, windows, params)
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len(ours) == 3
