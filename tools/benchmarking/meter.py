"""Measuring in turns: every variant runs once per round, so that changes of the machine's speed affect all alike."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pipeline import Loader

from . import machine

SETTLE = 4  # untimed steps at the start of each turn: they use up batches prefetched during other turns


@dataclass
class Meter:
    """A variant to measure: `steps` processes one batch per item and yields its number of images."""

    name: str
    steps: Iterator[int]
    close: Callable[[], None] = lambda: None
    settle: int = SETTLE
    share: float = 1.0  # fraction of a turn's seconds
    rates: list[float] = field(default_factory=list)  # images per second, one per turn
    cpu: list[float] = field(default_factory=list)  # CPU-seconds per 1,000 images, one per turn
    busy: list[float] = field(default_factory=list)  # cores kept busy, one per turn
    feeding: list[float] = field(default_factory=list)  # ms per image of the busiest single thread, one per turn
    latencies: list[float] = field(default_factory=list)  # seconds per batch, of all turns

    def turn(self, seconds: float) -> None:
        rest()
        for _ in range(self.settle):
            next(self.steps)
        synchronize()
        images, cpu, alone, start = 0, machine.cpu_seconds(), single_threads(), time.perf_counter()
        before = start
        while before - start < seconds * self.share or not images:
            images += next(self.steps)
            now = time.perf_counter()
            self.latencies.append(now - before)
            before = now
        synchronize()
        wall, cpu = time.perf_counter() - start, machine.cpu_seconds() - cpu
        took = [seconds - alone.get(thread, 0.0) for thread, seconds in single_threads().items()]
        self.feeding.append(1e3 * max(took) / images)
        self.rates.append(images / wall)
        self.cpu.append(1000 * cpu / images)
        self.busy.append(cpu / wall)

    @property
    def rate(self) -> dict[str, float]:
        return spread(self.rates)

    @property
    def latency_ms(self) -> dict[str, float]:
        p50, p99, largest = np.percentile(np.array(self.latencies) * 1e3, [50, 99, 100])
        return {"p50": round(p50, 2), "p99": round(p99, 2), "max": round(largest, 2)}


def rest() -> None:
    """Wait until the prefetching of earlier turns has ended, so that it is not charged to the next turn."""
    deadline = time.perf_counter() + 10
    while time.perf_counter() < deadline:
        before = machine.cpu_seconds()
        time.sleep(0.05)
        if machine.cpu_seconds() - before < 0.01:
            return


def single_threads() -> dict[int, float]:
    """CPU-seconds of each thread whose work is serial: the calling thread takes batches, others feed DALI."""
    threads = [t for t in threading.enumerate() if t.name.startswith("loader_feeds")]
    idents = [threading.get_ident(), *(t.ident for t in threads if t.ident is not None)]
    return {ident: time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in idents}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: list[float], digits: int = 1) -> dict[str, float]:
    return {
        "median": round(float(np.median(values)), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def in_turns(meters: list[Meter], seconds: float, repeats: int, say: Callable[[str], None]) -> None:
    """Measure `repeats` rounds, in each of which every meter runs for `seconds` x its share."""
    for number in range(repeats):
        for meter in meters:
            meter.turn(seconds)
        say(
            f"round {number + 1} of {repeats}: "
            + ", ".join(f"{m.name} {m.rates[-1]:.4g}" for m in meters)
            + " images/s"
        )


def repeat(step: Callable[[int], int]) -> Iterator[int]:
    """Yield step(0), step(1), ...; `step` processes one batch and returns its number of images."""
    number = 0
    while True:
        yield step(number)
        number += 1


def of_loader(name: str, loader: Loader, **settings: Any) -> Meter:
    """A meter of a loader's batches, epoch after epoch."""
    return Meter(name, (len(batch.label) for batch in loader.forever()), loader.close, **settings)
