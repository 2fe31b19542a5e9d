"""Checks of the forms' rates, and of how much they slow a trainer."""

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
    """Measure source images/s with all views in each form, at default settings. The best form must reach the goal."""
    bench.note("threads", len(os.sched_getaffinity(0)))
    for name in RECIPES:
        for form in bench.forms:
            bench.note(f"{name} {form}", _rate(bench, name, form=form))
        found = {form: bench.figures[f"{name} {form}"]["images_per_s"] for form in bench.forms}
        best = max(found, key=lambda form: found[form])
        bench.note(f"fastest of {name}", best)
        goal = GOALS[name] if bench.gpu and "H100" in torch.cuda.get_device_name() else 0
        assert found[best] >= goal, f"{name}: {found[best]} images/s, below the goal of {goal}"


def shares_and_threads(bench: Bench) -> None:
    """Measure rates over the share of the JPEG engines with all threads, then over threads with the best share."""
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
    """Measure how much the loader slows a device that multiplies matrices, at 1,500 images/s."""
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
    assert not bench.gpu or not costly, f"the loader takes more than 5 % of the GPU: {', '.join(costly)}"


def _multiply(
    bench: Bench, matrix: torch.Tensor, products: int, steps: int, batches: Iterator[Batch] | None = None
) -> float:
    """Seconds for `steps` steps of `products` matrix products; each step first takes a batch of `batches`, if given."""
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
    """Check that the loader yields a batch while the trainer's stream is still busy, without waiting for the device."""
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
