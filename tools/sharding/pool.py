"""Many shards over processes, with progress: one line, rewritten, on a terminal; a line every half minute elsewhere."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from itertools import zip_longest
from multiprocessing.connection import wait as wait_for
from typing import Any

from . import SourceError
from .writer import OnProgress

_LINE_EVERY, _REWRITTEN_EVERY = 30.0, 0.2  # seconds, without and with a terminal
Make = Callable[[int, OnProgress], object]  # makes one shard; must travel to other processes


class Progress:
    """images/s, MB/s, and, where the total is known, time left, repaired and quarantined."""

    def __init__(self, total: int | None, verb: str):
        self._total, self._verb, self._terminal = total, verb, sys.stdout.isatty()
        self._counts = [0, 0, 0, 0]
        self._began = self._shown = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal and self._shown > self._began:
            print()

    def add(self, *more: int) -> None:
        """More (images, bytes, repaired, quarantined); the last two may be missing."""
        self.show([count + one for count, one in zip_longest(self._counts, more, fillvalue=0)])

    def show(self, counts: list[int]) -> None:
        """All of them so far."""
        self._counts, now = counts, time.monotonic()
        if now - self._shown < (_REWRITTEN_EVERY if self._terminal else _LINE_EVERY):
            return
        self._shown, took = now, max(now - self._began, 1e-9)
        done, read, repaired, quarantined = counts
        text = f"{self._verb} {done:,}" + (f"/{self._total:,}" if self._total is not None else "")
        text += f" images, {done / took:.0f} images/s, {read / took / 1e6:.0f} MB/s"
        if self._total is not None:
            left = (self._total - done) * took / max(done, 1) / 60
            text += f", {left:.0f} min left, {repaired} repaired, {quarantined} quarantined"
        print(f"\r{text}\033[K" if self._terminal else text, end="" if self._terminal else "\n", flush=True)


def run(make: Make, shards: list[int], images: int, workers: int) -> None:
    """Calls `make` for each shard, `images` in all of them together; the first error stops the rest and is raised."""
    with Progress(images, "sharding") as progress:
        if workers == 1 or len(shards) == 1:
            for shard in shards:
                make(shard, progress.add)
        else:
            _run_many(make, shards, min(workers, len(shards)), progress)


def _run_many(make: Make, shards: list[int], workers: int, progress: Progress) -> None:
    context = multiprocessing.get_context("spawn")  # nothing inherited: no lock, no open file, no thread cut in two
    counts, next_shard, errors = context.Array("q", 4), context.Value("q", 0), context.SimpleQueue()
    job = (make, shards, counts, next_shard, errors)
    processes = [context.Process(target=_work, args=job, daemon=True) for _ in range(workers)]
    try:
        for process in processes:
            process.start()
        alive = list(processes)
        while alive:
            wait_for([process.sentinel for process in alive], timeout=0.25)
            progress.show(counts[:])
            codes = [process.exitcode for process in alive]  # once: a process may end between two looks
            if any(codes):
                if not errors.empty():
                    raise errors.get()
                raise RuntimeError(
                    "a worker was killed (out of memory?): run the same command again, perhaps with fewer --workers"
                )
            alive = [process for process, code in zip(alive, codes, strict=True) if code is None]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def _work(make: Make, shards: list[int], counts: Any, next_shard: Any, errors: Any) -> None:
    """A worker process: takes the next shard until there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, and the parent ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def on_progress(*more: int) -> None:
        with counts.get_lock():
            for position, one in enumerate(more):
                counts.get_obj()[position] += one

    try:
        while True:
            with next_shard.get_lock():
                position = next_shard.value
                next_shard.value += 1
            if position >= len(shards):
                return
            make(shards[position], on_progress)
    except Exception as error:
        known = isinstance(error, SourceError | OSError | RuntimeError)
        errors.put(error if known else RuntimeError(f"{type(error).__name__}: {error}"))
        sys.exit(1)


def _end_with_parent() -> None:
    """A worker whose parent was killed must not go on writing beside the parent's successor."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)
