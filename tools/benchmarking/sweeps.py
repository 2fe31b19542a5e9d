"""Sweeps: the best setting, how speed scales, and how close training on the loader comes to its ceiling."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import cycle, islice, product
from typing import Any

import numpy as np
import torch

from pipeline import Batch, Loader, draws, recipes
from pipeline.order import positions
from pipeline.preparation import by_kind
from trainer import methods
from trainer.step import TrainingStep

from .meter import Meter, in_turns, of_loader, spread, synchronize
from .stages import Task

Say = Callable[[str], None]


def tune(task: Task, seconds: float, say: Say) -> dict[str, Any]:
    """Search the setting with the most images per second; each is measured in two turns.

    Threads and (on a GPU) the share of the hardware decoder are searched together, because threads decode what the
    hardware does not. Then the prefetch depth and then the batch size are searched at the best setting so far.
    """
    rows = list[dict[str, Any]]()

    def best_of(settings: Iterable[dict[str, Any]]) -> dict[str, Any]:
        for setting in settings:
            meter = of_loader("tune", task.loader(**setting), settle=3 * setting["prefetch"])  # prefetched
            for _ in range(2):
                meter.turn(seconds)
            meter.close()
            rows.append({**setting, "images_per_s": meter.rate})
            say(f"tune: {rows[-1]}")
        best = max(rows, key=lambda row: row["images_per_s"]["median"])
        return {name: value for name, value in best.items() if name != "images_per_s"}

    given = task.num_threads
    threads = sorted({max(1, given // 2), given, given + max(1, given // 2)})
    loads: list[float | None] = [0.0, 0.25, 0.5, 0.65, 0.8, 1.0] if task.gpu else [None]
    usual = {"prefetch": 2, "batch_size": task.batch_size}
    best = best_of({"num_threads": count, "hw_decoder_load": load, **usual} for count, load in product(threads, loads))
    best = best_of([{**best, "prefetch": depth} for depth in (1, 4)])
    sizes = {max(1, task.batch_size // 2), min(task.batch_size * 2, len(task.shards))} - {task.batch_size}
    best_of([{**best, "batch_size": size} for size in sorted(sizes)])
    return {"table": rows, "best": max(rows, key=lambda row: row["images_per_s"]["median"])}


def scaling(task: Task, seconds: float, repeats: int, say: Say) -> dict[str, Any]:
    """Measure images per second over threads, batch sizes and views, and the host's work over the size of the set."""
    found: dict[str, Any] = {}

    def curve(name: str, loaders: dict[Any, Loader]) -> None:
        meters = [of_loader(str(key), loader) for key, loader in loaders.items()]
        in_turns(meters, seconds, repeats, lambda text: say(f"{name}: {text}"))
        for meter in meters:
            meter.close()
        found[name] = {meter.name: meter.rate for meter in meters}

    top = task.num_threads
    curve("threads", {n: task.loader(num_threads=n) for n in sorted({1, 2, *range(4, top + 1, 4), top}) if n <= top})
    sizes = [b for b in (8, 32, 64, 128, 256) if b <= len(task.shards)]
    curve("batch", {b: task.loader(batch_size=b) for b in sizes})
    made = {n: recipes.loca(focal_views=n) for n in (0, 3, 6, 9, 18)}
    curve("views", {2 + n: task.loader(recipe) for n, recipe in made.items()})
    pixels = {str(2 + n): round(1e-6 * sum(c.count * c.size**2 for c in recipe.cuts), 3) for n, recipe in made.items()}
    found["megapixels_cut"] = pixels
    found["table_rows"] = {f"{n:.0e}": _host_ms(task, n, repeats) for n in (10**3, 10**4, 10**5, 10**6, 10**7)}
    say(f"host milliseconds per 1,000 images over table rows: {found['table_rows']}")
    return found


def _host_ms(task: Task, n: int, repeats: int) -> dict[str, float]:
    """Milliseconds per 1,000 images for order, table rows, draws and targets, in a set of `n` images."""
    recipe, b = task.recipe, 250
    assert recipe is not None
    table = np.resize(task.shards.table, n)
    distributions = draws.distributions(recipe)
    times = []
    for turn in range(repeats + 1):
        start = time.perf_counter()
        for step in range(8):
            at = (turn * 8 + step) * b % (n - b + 1)
            index = positions(0, 0, at, at + b, n)
            rows = table[index]
            sizes = np.stack([rows["height"], rows["width"]], axis=-1)
            windows, _ = draws.draw(distributions, 0, 0, index, sizes)
            if recipe.targets:
                recipe.targets(by_kind(recipe, windows))
        times.append((time.perf_counter() - start) * 1e3 / (8 * b / 1e3))
    return spread(times[1:], 3)


def headspace_config(method: str, backbone: str | None) -> tuple[Any, Any]:
    """A method's module and its settings. Raises ValueError for an unknown method or backbone."""
    if method not in methods.names():
        raise ValueError(f"--method {method!r}: choose from {', '.join(methods.names())}")
    module = methods.load(method)
    config = module.Config() if backbone is None else replace(module.Config(), backbone=backbone)
    module.views(config)  # raises for an unknown backbone
    return module, config


def headspace(task: Task, method: str, backbone: str | None, seconds: float, repeats: int, say: Say) -> dict[str, Any]:
    """Measure training steps alternately on batches replayed from memory (the ceiling) and on the loader."""
    module, config = headspace_config(method, backbone)
    device = torch.device(task.device)
    model = module.Method(config).to(device)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-5, fused=True)
    if task.gpu:
        model.compile(dynamic=False)
    step = TrainingStep(model, optimizer, amp_dtype=torch.bfloat16 if task.gpu else None, clip=1.0)
    progress = torch.zeros((), device=device)

    def train(batches: Iterator[Batch]) -> Iterator[int]:
        while True:
            yield len(step(batches, progress).index)

    recipe = module.views(config)
    loader = task.loader(recipe)
    stored = [batch.to(device) for batch in islice(loader.forever(), 4)]

    meters = [
        Meter("replayed", train(cycle(stored)), settle=2),
        Meter("loader", train(loader.forever()), settle=4),
    ]
    in_turns(meters, seconds, repeats, lambda text: say(f"headspace: {text}"))
    synchronize()
    loader.close()
    ceiling, real = (float(np.median(meter.rates)) for meter in meters)
    return {
        "method": method,
        "backbone": getattr(config, "backbone", None),
        "replayed_images_per_s": meters[0].rate,
        "loader_images_per_s": meters[1].rate,
        "real_over_ceiling": round(real / ceiling, 3),
    }
