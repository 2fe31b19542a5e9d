"""The loader's promises: what is random follows from (seed, epoch, sample, view), and nothing else changes a batch."""

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mapimages import coordinates, expected, smooth_image, still_recipe, write_set

from pipeline import Batch, Loader, ShardSet, recipes
from pipeline.graph import Graph
from pipeline.recipes import Recipe

N = 24
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    return ShardSet(write_set(tmp_path_factory.mktemp("set"), N, 3))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet(write_set(tmp_path_factory.mktemp("photos"), 12, 2, make=smooth_image, form="JPEG"))


RECIPE = still_recipe(size=32, queries=2)


def loader(shards: ShardSet, batch_size: int = 4, recipe: Recipe = RECIPE, **options: object) -> Loader:
    return Loader(shards, recipe, batch_size, **{"seed": 5, "num_threads": 1, **options})  # type: ignore[arg-type]


def facts(batches: Iterable[Batch]) -> dict[tuple[int, int], str]:
    """(place in the sequence, sample) -> a hash of all that the batch says of it: pixels, windows, targets, label."""
    found = {}
    place = 0
    for batch in batches:
        tensors = [t for view in batch.views.values() for t in (view.pixels, view.window)]
        tensors += [*batch.targets.values(), batch.label]
        for b, i in enumerate(batch.index.tolist()):
            content = b"".join(t[b].contiguous().numpy().tobytes() for t in tensors)
            found[place, i] = hashlib.sha256(content).hexdigest()
            place += 1
    return found


def epochs(source: Loader, count: int) -> list[dict[tuple[int, int], str]]:
    return [facts(source) for _ in range(count)]


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


def test_prefetching_changes_nothing_but_when(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batches at any depth, also when resumed at another; no more than `prefetch` are ever in DALI's hands."""
    wanted = epochs(loader(shards), 2)
    submit, submitted = Graph.submit, []
    monkeypatch.setattr(Graph, "submit", lambda *a: submitted.append(1) or submit(*a))
    for depth in (1, 2, 4):
        source = loader(shards, prefetch=depth)
        assert epochs(source, 2) == wanted
        source, batches = loader(shards, prefetch=depth), []
        submitted.clear()
        for batch in source:
            batches.append(batch)
            assert len(batches) <= len(submitted) <= len(batches) + depth
            if len(batches) == 4:
                break
        resumed = loader(shards, prefetch=5 - depth)
        resumed.load_state_dict(source.state_dict())
        assert facts([*batches, *resumed]) == wanted[0]


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


def test_resume_at_every_step(shards: ShardSet) -> None:
    """At each step of two epochs: the state goes through JSON into new loaders, twice in a row; nothing changes."""
    source = loader(shards, 8)
    states = [source.state_dict()]
    batches = []
    for _ in range(2):
        for batch in source:
            batches.append(batch)
            states.append(source.state_dict())
    assert [(s["epoch"], s["position"]) for s in states] == [(0, 0), (0, 8), (0, 16), (1, 0), (1, 8), (1, 16), (2, 0)]
    for k, state in enumerate(states[:-1]):
        resumed = loader(shards, 8)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert resumed.state_dict() == state
        again = loader(shards, 8)
        again.load_state_dict(resumed.state_dict())
        rest = list(again)
        assert again.state_dict() == states[3 if k < 3 else 6]
        assert facts(rest) == facts(batches[k : 3 if k < 3 else 6])
        if k == 4:  # ... and once more, from the middle of what was resumed
            resumed.load_state_dict(states[4])
            next(iter(resumed))
            third = loader(shards, 8)
            third.load_state_dict(resumed.state_dict())
            assert facts(third) == facts(batches[5:6])


def test_resume_with_other_ranks_batches_and_threads(shards: ShardSet) -> None:
    source = loader(shards, 4)
    wanted = dict(facts(source))
    for steps in range(6):
        source = loader(shards, 4)
        for _ in range(steps):
            next(iter(source))
        state = source.state_dict()
        after = {i: h for (place, i), h in wanted.items() if place >= 4 * steps}
        for world, batch_size in ((1, 2), (2, 2), (4, 1), (2, 1), (8, 1)):
            if steps % 2 and world == 8:
                continue  # half a batch would be left over
            seen: dict[int, str] = {}
            for rank in range(world):
                part = loader(shards, batch_size, rank=rank, world_size=world, num_threads=2)
                part.load_state_dict(state)
                seen.update({i: h for (_, i), h in facts(part).items()})
                assert part.epoch == 1
            assert seen == after


def test_what_an_epoch_leaves_out_differs_from_the_next(shards: ShardSet) -> None:
    source = loader(shards, 5)
    left = [set(range(N)) - {i for _, i in facts(source)} for _ in range(6)]
    assert {len(missing) for missing in left} == {4}
    assert len({frozenset(missing) for missing in left}) == 6


def test_bytes_are_asked_for_before_they_are_read(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system is told of all of a batch's images before the first of them is read."""
    told: list[tuple[int, int]] = []
    asked: list[tuple[int, int]] = []
    advise, pread = os.posix_fadvise, os.pread

    def spy(fd: int, offset: int, size: int, how: int) -> None:
        assert how == os.POSIX_FADV_WILLNEED
        told.append((offset, size))
        advise(fd, offset, size, how)

    def read(fd: int, size: int, offset: int) -> bytes:
        if not len(asked) % 4:
            assert len(told) == len(asked) + 4
        asked.append((offset, size))
        return pread(fd, size, offset)

    samples = loader(shards)._prepare.samples
    monkeypatch.setattr(os, "posix_fadvise", spy)
    monkeypatch.setattr(os, "pread", read)
    for start in range(0, 12, 4):
        samples.load(0, np.arange(start, start + 4))
    assert asked == told
    assert len(asked) == 12


def test_an_epoch_without_a_batch_left_is_over(shards: ShardSet) -> None:
    source = loader(shards, 4)
    for _ in range(5):
        next(iter(source))
    resumed = loader(shards, 8)  # four samples are left, half a batch
    resumed.load_state_dict(source.state_dict())
    assert resumed.epoch == 1
    assert len(list(resumed)) == 3


def test_a_broken_off_loop_goes_on(shards: ShardSet) -> None:
    wanted = facts(loader(shards))
    source = loader(shards)
    batches = []
    while source.epoch == 0:
        for batch in source:
            batches.append(batch)
            if len(batches) % 2:
                break
    assert facts(batches) == wanted
    source.close()
    assert [len(facts([b])) for b in source] == [4] * 6


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("seed", {"seed": 6}),
        (r"recipe\.cuts\[0\]\.scale", {"recipe": still_recipe(size=32, queries=2).cuts}),
        ("order", {"order": "block"}),
        ("order", {"shuffle": False}),
        (r"recipe\.name", {"recipe": recipes.loca("paper")}),
    ],
)
def test_a_state_of_something_else_is_refused(shards: ShardSet, field: str, change: dict) -> None:
    state = loader(shards).state_dict()
    if isinstance(change.get("recipe"), tuple):
        wider = [recipes.Cut(**{**vars(cut), "scale": (0.5, 1.0)}) for cut in change["recipe"]]
        change = {"recipe": Recipe("still", "paper", tuple(wider))}
    with pytest.raises(ValueError, match=field):
        loader(shards, **change).load_state_dict(state)


def test_a_state_of_another_set_or_none_is_refused(shards: ShardSet, photos: ShardSet) -> None:
    state = loader(shards).state_dict()
    with pytest.raises(ValueError, match="shards"):
        loader(photos).load_state_dict(state)
    with pytest.raises(ValueError, match="'seed'"):
        loader(shards).load_state_dict({"version": 1})
    with pytest.raises(ValueError, match="not taken from a Loader"):
        loader(shards).load_state_dict(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="position 99"):
        loader(shards).load_state_dict({**state, "position": 99})
    with pytest.raises(ValueError, match="epoch 1180591620717411303424"):
        loader(shards).load_state_dict({**state, "epoch": 2**70})


def test_numbers_may_be_numpys(shards: ShardSet) -> None:
    wanted = facts(loader(shards, 4, seed=5))
    assert facts(loader(shards, np.int64(4), seed=np.int64(5), rank=np.int32(0), world_size=np.int64(1))) == wanted
    json.dumps(loader(shards, seed=np.int64(5)).state_dict())
    for options in ({"batch_size": 4.5}, {"prefetch": 1.5}, {"num_threads": "2"}):
        with pytest.raises(TypeError, match=f"{next(iter(options))} .* must be a whole number"):
            loader(shards, **options)


def test_two_iterators_share_one_epoch(shards: ShardSet) -> None:
    source, wanted = loader(shards), facts(loader(shards))
    one, other = iter(source), iter(source)
    assert facts(next(one if k % 2 else other) for k in range(6)) == wanted
    assert next(one, None) is next(other, None) is None


def test_a_state_may_be_loaded_inside_the_loop(shards: ShardSet) -> None:
    source, seen, states = loader(shards), [], []
    for batch in source:
        seen.append(batch)
        states.append(source.state_dict())
        if len(seen) == 4:
            source.load_state_dict(states[1])
    wanted = list(facts(loader(shards)).values())
    assert list(facts(seen).values()) == wanted[:16] + wanted[8:]


@pytest.mark.filterwarnings("ignore:This process")  # Python 3.12 warns of what is tested here
def test_a_started_loader_does_not_hang_in_a_fork(shards: ShardSet) -> None:
    source = loader(shards)
    next(iter(source))
    child = os.fork()
    if not child:
        signal.alarm(20)  # rather than hanging
        try:
            next(iter(source))
        except RuntimeError as error:
            os._exit(0 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(list(source)) == 5  # here it goes on


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


def test_threads_follow_the_cores_that_we_may_use(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("pipeline.loader.Graph", lambda *_, num_threads, **__: asked.append(num_threads))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    for ranks in ("1", "4", "64"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        Loader(shards, RECIPE, 4)._build()
    assert asked == [12, 3, 1]


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
    ],
)
def test_targets_that_are_none_of_the_batch_are_refused(shards: ShardSet, found: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        next(iter(loader(shards, recipe=replace(RECIPE, targets=lambda _: found))))


def test_the_measure_of_shuffling(shards: ShardSet) -> None:
    quality = loader(shards).shuffle_quality()
    assert set(quality) == {"spread", "shards"}
    assert loader(shards, shuffle=False).shuffle_quality()["spread"] < 0.2 < quality["spread"]


def test_a_dropped_loader_leaves_no_thread(shards: ShardSet) -> None:
    before = set(threading.enumerate())
    source = loader(shards)
    next(iter(source))
    assert set(threading.enumerate()) - before
    gone = weakref.ref(source)
    del source
    gc.collect()
    assert gone() is None
    for _ in range(50):
        if not set(threading.enumerate()) - before:
            break
        time.sleep(0.05)
    assert not set(threading.enumerate()) - before


PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
sys.path.insert(0, {tests!r})
from mapimages import still_recipe
from pipeline import Loader
loader = Loader({shards!r}, still_recipe(size=32, queries=2), 4, num_threads=1)
for epoch in range(10**6):
    for batch in loader:
        if loader.epoch == 1 and {end}:
            sys.exit(0)
        print("batch", flush=True)
        time.sleep({pause})
"""


@pytest.mark.slow  # seconds of imports; the next one shows nearly the same
def test_the_process_ends_in_the_middle_of_an_epoch(shards: ShardSet) -> None:
    code = PROGRAM.format(tests=str(ROOT / "tests"), shards=str(shards.paths[0].parent), end=True, pause=0)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_ctrl_c_ends_it(shards: ShardSet) -> None:
    code = PROGRAM.format(tests=str(ROOT / "tests"), shards=str(shards.paths[0].parent), end=False, pause=0.01)
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "batch\n"
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, error = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in error
    assert process.returncode != 0
    assert time.monotonic() - start < 20


def test_iterating_goes_on_after_an_interruption(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the worst moment, a result just taken out of DALI: the next batch is still the right one."""
    wanted = facts(loader(shards))
    source = loader(shards)
    batches = [next(iter(source)), next(iter(source))]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(source, "_batch", interrupt)
        next(iter(source))
    assert facts([*batches, *source]) == wanted


@pytest.mark.slow
def test_memory_stays_flat_over_twenty_epochs(photos: ShardSet) -> None:
    source = loader(photos, 6, recipes.loca("paper"), num_threads=2)
    sizes = []
    for _ in range(20):
        for _batch in source:
            pass
        del _batch
        sizes.append(_resident())
    assert max(sizes[10:]) - min(sizes[3:10]) < 30 << 20, [s >> 20 for s in sizes]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
