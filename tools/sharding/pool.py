"""Makes shards in several processes, with progress: one rewritten line on a terminal, else a line per half minute."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for

from . import SourceError

_LINE_EVERY, _REWRITTEN_EVERY = 30.0, 0.2  # seconds, without and with a terminal
Make = Callable[[int], dict]  # makes one shard and returns its entry in the manifest; must be picklable


class Progress:
    """Prints images/s and MB/s, and if the total is known, time left, repaired and quarantined images."""

    def __init__(self, total: int | None, verb: str):
        self._total, self._verb, self._terminal = total, verb, sys.stdout.isatty()
        self._counts = [0, 0, 0, 0]
        self._began = self._shown = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal and self._shown > self._began:
            print()

    def add(self, images: int, read: int, repaired: int = 0, quarantined: int = 0) -> None:
        """Count more images, their bytes, and how many of them were repaired and quarantined."""
        more = (images, read, repaired, quarantined)
        self._counts, now = [a + b for a, b in zip(self._counts, more, strict=True)], time.monotonic()
        if now - self._shown < (_REWRITTEN_EVERY if self._terminal else _LINE_EVERY):
            return
        self._shown, took = now, max(now - self._began, 1e-9)
        done, read, repaired, quarantined = self._counts
        text = f"{self._verb} {done:,}" + (f"/{self._total:,}" if self._total is not None else "")
        text += f" images, {done / took:.0f} images/s, {read / took / 1e6:.0f} MB/s"
        if self._total is not None:
            left = (self._total - done) * took / max(done, 1) / 60
            text += f", {left:.0f} min left, {repaired} repaired, {quarantined} quarantined"
        print(f"\r{text}\033[K" if self._terminal else text, end="" if self._terminal else "\n", flush=True)


def run(make: Make, shards: list[int], images: int, workers: int) -> None:
    """Call `make` for each shard. `images` is the total of all shards. The first error stops the rest and is raised."""
    results = map(make, shards) if workers == 1 or len(shards) == 1 else _many(make, shards, min(workers, len(shards)))
    with Progress(images, "sharding") as progress:
        for entry in results:
            quarantined = entry["quarantined"]
            progress.add(entry["samples"] + quarantined, entry["bytes"], entry["repaired"], quarantined)


def _many(make: Make, shards: list[int], workers: int) -> Iterator[dict]:
    context = multiprocessing.get_context("spawn")  # inherits nothing: no lock, no open file, no half-copied thread
    left, processes, pipes = iter(shards), [], []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_work, args=(make, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
            ours.send(next(left))
            pipes.append(ours)
        while pipes:
            for pipe in wait_for(pipes):
                assert isinstance(pipe, Connection)
                try:
                    result = pipe.recv()
                except EOFError:
                    raise RuntimeError(
                        "a worker was killed (out of memory?): run the same command again, perhaps with fewer --workers"
                    ) from None
                if isinstance(result, Exception):
                    raise result
                shard = next(left, None)
                with suppress(BrokenPipeError):  # the worker has died: the next recv raises EOFError
                    pipe.send(shard)
                if shard is None:
                    pipes.remove(pipe)
                yield result
    finally:
        for process in processes:
            process.kill()


def _work(make: Make, pipe: Connection) -> None:
    """Run a worker process: make the shards received from `pipe`, until None arrives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which then kills its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while (shard := pipe.recv()) is not None:
        try:
            pipe.send(make(shard))
        except Exception as error:
            known = isinstance(error, SourceError | OSError | RuntimeError)
            pipe.send(error if known else RuntimeError(f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """Exit when the parent has died: this worker must not write at the same time as the parent's successor."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)
