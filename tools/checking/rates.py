"""How fast are the forms, and what do they take from a trainer?"""

import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipeline import Batch, Loader, recipes
from pipeline.graph import Form

from .bench import RECIPES, Bench

GOALS = {"loca": 5000, "vicregl": 6000}  # images a second on an H100 with 16 cores


def loader_throughput(bench: Bench) -> None:
    """Source images a second with all views: the forms against each other, as DALI and the loader set them up."""
    bench.note("threads", len(os.sched_getaffinity(0)))
    for name in RECIPES:
        for form in bench.forms:
            bench.note(f"{name} {form}", _rate(bench, name, form=form))
        found = {form: bench.figures[f"{name} {form}"]["images_per_s"] for form in bench.forms}
        best = max(found, key=lambda form: found[form])
        bench.note(f"fastest of {name}", best)
        goal = GOALS[name] if bench.gpu and "H100" in torch.cuda.get_device_name() else 0
        assert found[best] >= goal, f"{name}: {found[best]} images a second, not {goal}"


def shares_and_threads(bench: Bench) -> None:
    """Where the rate comes from: the share of the JPEG engines with all threads, then threads with the best share."""
    cores = len(os.sched_getaffinity(0))
    form: Form = "operators" if bench.gpu else "fused"
    shares = (0.65, 0.25) if bench.quick else (0.65, 0.0, 0.25, 0.5, 0.8, 1.0)
    for name in RECIPES:
        found = {}
        for share in shares if bench.gpu else ():
            figure = _rate(bench, name, form=form, hw_decoder_load=share)
            bench.note(f"{name} {form} hw={share}", figure)
            found[share] = figure["images_per_s"]
        best = max(found, key=lambda share: found[share], default=None)
        for threads in sorted({max(1, cores // 4), max(1, cores // 2), cores}):
            figure = _rate(bench, name, form=form, hw_decoder_load=best, num_threads=threads)
            bench.note(f"{name} {form} hw={best} threads={threads}", figure)


def _rate(bench: Bench, name: str, **settings: Any) -> dict[str, int]:
    loader = Loader(bench.shards, RECIPES[name](), 2 * bench.batch, device=bench.device, **settings)
    found = _rates(bench, loader, steps=10 if bench.quick else 40, repeats=3)
    loader.close()
    return {"images_per_s": round(float(np.median(found))), "min": round(min(found)), "max": round(max(found))}


def _rates(bench: Bench, loader: Loader, steps: int, repeats: int) -> list[float]:
    batches = loader.forever()
    for _ in range(8):
        next(batches)
    rates = []
    for _ in range(repeats):
        bench.synchronize()
        start, seen = time.perf_counter(), 0
        for _ in range(steps):
            seen += len(next(batches).label)
        bench.synchronize()
        rates.append(seen / (time.perf_counter() - start))
    return rates


def the_gpu_is_left_to_the_trainer(bench: Bench) -> None:
    """What decoding, cutting and augmenting 1,500 images a second take from a device that multiplies matrices."""
    side = 8192 if bench.gpu else 256
    matrix = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    costly = []
    for name, make in RECIPES.items():
        for form in bench.forms:
            loader = bench.loader(make(), form=form)
            batches = loader.forever()
            for _ in range(2):
                _multiply(bench, matrix, 10, 4, batches)
            each = _multiply(bench, matrix, 100, 1) / 100
            products, steps = max(1, round(bench.batch / 1500 / each)), 10 if bench.quick else 60
            rounds = [[_multiply(bench, matrix, products, steps, feed) for feed in (None, batches)] for _ in range(3)]
            alone, fed = np.median(rounds, axis=0)
            loader.close()
            taken = round(100 * (fed / alone - 1), 1)
            bench.note(f"{name} {form}", {"images_per_s": round(steps * bench.batch / fed), "percent_taken": taken})
            costly += [f"{name} {form}"] if fed > 1.05 * alone else []
    assert not bench.gpu or not costly, f"more than 5 % of the GPU: {', '.join(costly)}"


def _multiply(
    bench: Bench, matrix: torch.Tensor, products: int, steps: int, batches: Iterator[Batch] | None = None
) -> float:
    """Seconds for so many steps of so many products, a batch taken before each step where there are `batches`."""
    bench.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        if batches:
            next(batches)
        for _ in range(products):
            torch.mm(matrix, matrix)
    bench.synchronize()
    return time.perf_counter() - start


def the_host_runs_ahead(bench: Bench) -> None:
    """A batch is handed out while the trainer's stream is still busy: nothing waits for the device."""
    for form in bench.forms:
        loader = bench.loader(recipes.loca(), form=form)
        batches = loader.forever()
        for _ in range(6):
            next(batches)
        bench.synchronize()
        waits = []
        for _ in range(3):
            if bench.gpu:
                torch.cuda._sleep(2_000_000_000)  # about a second
                busy = torch.cuda.Event()
                busy.record()
            start = time.perf_counter()
            next(batches)
            waits.append(1e3 * (time.perf_counter() - start))
            early = not (bench.gpu and busy.query())
            bench.note(f"ms_per_batch_behind_a_busy_stream {form}", [round(wait, 1) for wait in waits])
            assert early, f"{form}: the loader waited for the trainer's stream"
            bench.synchronize()
        loader.close()
