"""The loader in its process: threads, prefetching, forks, signals, memory."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loaders import RECIPE, N, epochs, facts, loader
from mapimages import smooth_image, write_set

from pipeline import Loader, ShardSet, recipes
from pipeline.graph import Graph
from pipeline.samples import Samples

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    return ShardSet(write_set(tmp_path_factory.mktemp("set"), N, 3))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet(write_set(tmp_path_factory.mktemp("photos"), 12, 2, make=smooth_image, form="JPEG"))


def test_prefetching_changes_nothing_but_when(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batches at any depth, also when resumed at another; no more than `prefetch` are ever in DALI's hands."""
    wanted = epochs(loader(shards), 2)
    submit, submitted = Graph.submit, []  # by which graph: the feeding thread of an earlier loader may be at work yet
    monkeypatch.setattr(Graph, "submit", lambda graph, *a: submitted.append(graph) or submit(graph, *a))
    for depth in (1, 2, 4):
        source = loader(shards, prefetch=depth)
        assert epochs(source, 2) == wanted
        source, batches = loader(shards, prefetch=depth), []
        for batch in source:
            batches.append(batch)
            assert len(batches) <= submitted.count(source._graph) <= len(batches) + depth
            if len(batches) == 4:
                break
        resumed = loader(shards, prefetch=5 - depth)
        resumed.load_state_dict(source.state_dict())
        assert facts([*batches, *resumed]) == wanted[0]


def test_bytes_are_asked_for_before_they_are_read(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a batch's images are requested from the system before the first is read."""
    requested: list[tuple[int, int]] = []
    asked: list[tuple[int, int]] = []
    advise, pread, here = os.posix_fadvise, os.pread, threading.get_ident()  # an earlier test's loader may still read

    def spy(fd: int, offset: int, size: int, how: int) -> None:
        assert how == os.POSIX_FADV_WILLNEED
        if threading.get_ident() == here:
            requested.append((offset, size))
        advise(fd, offset, size, how)

    def read(fd: int, size: int, offset: int) -> bytes:
        if threading.get_ident() == here:
            if not len(asked) % 4:
                assert len(requested) == len(asked) + 4
            asked.append((offset, size))
        return pread(fd, size, offset)

    samples = loader(shards)._prepare.samples
    monkeypatch.setattr(os, "posix_fadvise", spy)
    monkeypatch.setattr(os, "pread", read)
    for start in range(0, 12, 4):
        samples.load(0, np.arange(start, start + 4))
    assert asked == requested
    assert len(asked) == 12


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


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_a_forked_child_may_let_go_of_a_started_loader(how: str, tmp_path: Path) -> None:
    """A DataLoader's worker does, when its garbage is collected: DALI's threads are not there to be joined."""
    program = f"""if True:
        import gc, os, signal, sys
        from pathlib import Path
        from loaders import loader
        from mapimages import write_set
        from pipeline import ShardSet
        gc.disable()
        source = loader(ShardSet(write_set(Path({str(tmp_path)!r}), 12, 2)))
        batches = iter(source)
        next(batches)
        box = [source, batches]
        box.append(box)  # garbage that only a collection finds
        child = os.fork()
        if child:
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        signal.alarm(20)  # rather than hanging
        if {how!r} == "closed":
            source.close()
        del source, batches, box
        gc.collect()
        os._exit(7)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (7, "")


def test_threads_follow_the_cores_that_we_may_use(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("pipeline.loader.Graph", lambda *_, num_threads, **__: asked.append(num_threads))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    for ranks in ("1", "4", "64"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        Loader(shards, RECIPE, 4)._build()
    assert asked == [12, 3, 1]


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


@pytest.mark.parametrize("form", ["fused", "operators"])
def test_the_trainers_thread_neither_feeds_nor_pins(
    form: str, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a GPU, but for pinning, which needs one: the same batches, made in threads of the loader's."""
    wanted = epochs(loader(shards, form=form), 2)
    feed, found = Graph._feed, []

    def note(what: str, result: Any) -> Any:
        found.append((what, threading.current_thread().name.rstrip("_0123456789")))
        return result

    monkeypatch.setattr(Graph, "_feed", lambda *batch: note("feed", feed(*batch)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: note("pin", tensor))
    source = loader(shards, form=form)
    source._prepare._task = replace(source._prepare._task, pinned=True)
    assert epochs(source, 2) == wanted
    source.close()
    assert set(found) == {("feed", "loader_feeds"), ("pin", "loader")}
    drawn, targets = len(RECIPE.cuts) * (form == "operators"), len(next(iter(source)).targets)
    assert found.count(("pin", "loader")) >= 12 * (drawn + targets + 1)


def test_closing_does_not_wait_for_bytes_that_do_not_come(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, source = facts(loader(shards)), loader(shards)
    first, load, arrive = source._prepare.positions(0, 0, 4), Samples.load, threading.Event()

    def slow(samples: Samples, epoch: int, positions: Any) -> Any:
        if not np.array_equal(positions, first):
            arrive.wait(60)
        return load(samples, epoch, positions)

    monkeypatch.setattr(Samples, "load", slow)
    batch = next(iter(source))
    start = time.monotonic()
    source.close()
    assert time.monotonic() - start < 20
    arrive.set()
    assert facts([batch, *source]) == wanted


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
