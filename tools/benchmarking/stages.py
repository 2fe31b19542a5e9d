"""The stages of the pipeline: each alone on one core, and cumulatively, as the loader runs them."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from nvidia import dali
from nvidia.dali import fn, types

from pipeline import Loader, Recipe, ShardSet, colour, cutting, draws, parameters
from pipeline.graph import Graph
from pipeline.order import positions
from pipeline.preparation import by_kind
from pipeline.recipes import Augmentation
from pipeline.samples import Samples

from . import machine
from .meter import Meter, of_loader, repeat

_POOL = 16  # batches that single stages process repeatedly: about 100 MB of stored images


@dataclass
class Task:
    """The setting to measure: shards, a recipe (None: decoding only), and the loader's settings."""

    shards: ShardSet
    recipe: Recipe | None
    batch_size: int
    num_threads: int
    device: str = "cpu"
    order: Any = "global"
    hw_decoder_load: float | None = None
    pixels: Any = "uint8"

    @property
    def dtype(self) -> torch.dtype:
        """Type of the views, of our loader and of the loaders to compare with."""
        return getattr(torch, self.pixels)

    def loader(self, recipe: Recipe | None = None, **changes: Any) -> Loader:
        settings: dict[str, Any] = {
            "device": self.device,
            "num_threads": self.num_threads,
            "order": self.order,
            "hw_decoder_load": self.hw_decoder_load,
            "pixels": self.pixels,
            **changes,
        }
        batch_size = settings.pop("batch_size", self.batch_size)
        chosen = recipe or self.recipe
        assert chosen is not None
        return Loader(self.shards, chosen, batch_size, **settings)

    @property
    def gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def device_id(self) -> int | None:
        """The GPU's number for DALI, or None on a CPU."""
        return (torch.device(self.device).index or 0) if self.gpu else None


class Decoder:
    """A DALI pipeline with nothing but the image decoder."""

    def __init__(self, task: Task, threads: int):
        gpu = task.gpu
        extra: dict[str, Any] = {"jpeg_fancy_upsampling": True} if gpu else {}
        if gpu and task.hw_decoder_load is not None:
            extra["hw_decoder_load"] = task.hw_decoder_load
        self._pipe = dali.Pipeline(
            batch_size=task.batch_size,
            num_threads=threads,
            device_id=task.device_id,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with self._pipe:
            stored = fn.external_source(name="image", dtype=types.DALIDataType.UINT8, ndim=1)
            self._pipe.set_outputs(
                fn.decoders.image(
                    stored,
                    device="mixed" if gpu else "cpu",
                    output_type=types.DALIImageType.RGB,
                    adjust_orientation=False,
                    **extra,
                )
            )

    def submit(self, images: list[Any]) -> None:
        self._pipe.feed_input("image", images)
        self._pipe.schedule_run()

    def take(self) -> Any:
        (images,) = self._pipe.outputs()
        return images


def uncoloured(recipe: Recipe) -> Recipe:
    """The recipe with the same windows, but without colour augmentation and targets."""
    cuts = tuple(
        replace(cut, augmentations=tuple(Augmentation(rule=c.rule) for c in cut.augmentations)) for cut in recipe.cuts
    )
    return replace(recipe, cuts=cuts, targets=None)


class Pool:
    """Some batches of stored images with their draws, as input for single stages."""

    def __init__(self, task: Task):
        self.samples = Samples(task.shards, 0)
        n, b = len(task.shards), task.batch_size
        self.wanted = [positions(0, 0, k * b % n, min(k * b % n + b, n), n) for k in range(min(_POOL, -(-n // b)))]
        loaded = [self.samples.load(0, wanted) for wanted in self.wanted]
        self.index, self.images = [index for index, _, _ in loaded], [images for _, images, _ in loaded]
        rows = [task.shards.table[index] for index in self.index]
        self.sizes = [np.stack([r["height"], r["width"]], -1) for r in rows]
        if task.recipe is not None:
            distributions = draws.distributions(task.recipe)
            drawn = [draws.draw(distributions, 0, 0, i, s) for i, s in zip(self.index, self.sizes, strict=True)]
            self.windows, self.params = [w for w, _ in drawn], [p for _, p in drawn]

    def __len__(self) -> int:
        return len(self.wanted)


def alone(task: Task, pool: Pool) -> list[Meter]:
    """A meter for each single stage, in the calling thread, on the output of the previous stage."""

    def stage(name: str, step: Callable[[int], Any], share: float = 0.1) -> Meter:
        def one(number: int) -> int:
            step(number % len(pool))
            return len(pool.index[number % len(pool)])

        return Meter(name, repeat(one), settle=1, share=share)

    decoder = Decoder(task, 1)

    def decode(k: int) -> None:
        decoder.submit(pool.images[k])
        decoder.take()
        if task.gpu:
            torch.cuda.synchronize()

    meters = [stage("read", lambda k: pool.samples.load(0, pool.wanted[k])), stage("decode", decode, 0.25)]
    recipe = task.recipe
    if recipe is None:
        return meters
    distributions = draws.distributions(recipe)
    meters.append(stage("draw", lambda k: draws.draw(distributions, 0, 0, pool.index[k], pool.sizes[k])))
    meters += _on_gpu(task, pool, recipe, stage) if task.gpu else _on_cpu(pool, recipe, decoder, stage)
    targets = recipe.targets
    if targets is not None:
        kinds = [by_kind(recipe, windows) for windows in pool.windows]
        meters.append(stage("correspondences", lambda k: targets(kinds[k])))
    graph = Graph(recipe, task.batch_size, device_id=task.device_id, num_threads=task.num_threads)
    graph.submit(pool.images[0], pool.windows[0], pool.params[0], pool.sizes[0])
    outputs = graph.take()
    meters.append(stage("transfer", lambda k: [torch.from_dlpack(output) for output in outputs]))
    return meters


def _on_cpu(pool: Pool, recipe: Recipe, decoder: Decoder, stage: Callable[..., Meter]) -> list[Meter]:
    decoder.submit(pool.images[0])
    images = [np.array(image) for image in decoder.take()]  # one decoded batch: all 16 would take too much memory
    outputs = tuple(np.empty((c.count, c.size, c.size, 3), np.uint8) for c in recipe.cuts)
    plain = pool.params[0].copy()
    plain[..., parameters.ORDER] = -1
    plain[..., [parameters.GRAY, parameters.SIGMA, parameters.SOLARIZE]] = 0

    def views(params: Any) -> Callable[[int], None]:
        def run(k: int) -> None:
            for i, image in enumerate(images):
                cutting.cut_image(outputs, image, pool.windows[0][i], params[i])

        return run

    meters = [stage("cut", views(plain), 0.25)]
    if uncoloured(recipe).cuts != recipe.cuts:
        meters.append(stage("cut + colour", views(pool.params[0]), 0.25))
    return meters


def _on_gpu(task: Task, pool: Pool, recipe: Recipe, stage: Callable[..., Meter]) -> list[Meter]:
    graph = Graph(recipe, task.batch_size, device_id=task.device_id, num_threads=1)

    def cut(k: int) -> list[Any]:
        graph.submit(pool.images[k], pool.windows[k], pool.params[k], pool.sizes[k])
        views = [torch.from_dlpack(view) for view in graph.take()]
        torch.cuda.synchronize()
        return views

    pixels = cut(0)
    params = [torch.from_numpy(p).to(task.device) for p in by_kind(recipe, pool.params[0]).values()]

    def paint(k: int) -> None:
        for view, numbers, c in zip(pixels, params, recipe.cuts, strict=True):
            colour.apply(view, numbers, c.augmentations)
        torch.cuda.synchronize()

    return [stage("decode + cut", cut, 0.25), stage("colour", paint, 0.25)]


def cumulative(task: Task) -> list[Meter]:
    """Meters from reading alone to the whole loader, each with all threads and prefetching."""
    samples = Samples(task.shards, 0)
    meters = [
        Meter("read", _reading(task, samples), share=0.25),
        Meter("decode", _decoding(task, samples), share=0.5),
    ]
    recipe = task.recipe
    if recipe is None:
        return meters
    plain = uncoloured(recipe)
    meters.append(of_loader("cut", task.loader(plain), share=0.5))
    if plain.cuts != recipe.cuts:
        meters.append(of_loader("colour", task.loader(replace(recipe, targets=None)), share=0.5))
    meters.append(of_loader("whole loader", task.loader()))
    return meters


def _loads(task: Task, samples: Samples) -> Iterator[list[Any]]:
    """Yield batches of stored images, read ahead by four threads as in the loader."""
    n, b = len(task.shards), task.batch_size
    wanted = (
        positions(0, epoch, start, min(start + b, n), n)
        for epoch in count()
        for start in range(0, max(1, n - b + 1), b)
    )
    with ThreadPoolExecutor(4) as pool:
        ahead = deque(pool.submit(samples.load, 0, next(wanted)) for _ in range(4))
        while True:
            yield ahead.popleft().result()[1]
            ahead.append(pool.submit(samples.load, 0, next(wanted)))


def _reading(task: Task, samples: Samples) -> Iterator[int]:
    return (len(images) for images in _loads(task, samples))


def _decoding(task: Task, samples: Samples) -> Iterator[int]:
    decoder, waiting = Decoder(task, task.num_threads), deque[int]()
    for images in _loads(task, samples):
        decoder.submit(images)
        waiting.append(len(images))
        if len(waiting) > 1:
            decoder.take()
            yield waiting.popleft()


def consume(task: Task, step_ms: float, seconds: float) -> dict[str, float]:
    """Simulate a trainer that sleeps `step_ms` for each batch, and return its waits for the loader."""
    loader, waits = task.loader(), list[float]()
    steps = loader.forever()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(waits) < 8:
        before = time.perf_counter()
        next(steps)
        waits.append(time.perf_counter() - before)
        time.sleep(step_ms / 1e3)
    loader.close()
    settled = np.array(waits[4:]) * 1e3
    return {
        "step_ms": round(step_ms, 2),
        "wait_ms": round(float(settled.mean()), 2),
        "wait_p99_ms": round(float(np.percentile(settled, 99)), 2),
        "wait_percent": round(float(100 * settled.sum() / (settled.sum() + step_ms * len(settled))), 2),
    }


def memory(task: Task, spec: str) -> dict[str, float]:
    """Memory in MB of a separate process with the whole loader after some batches: the peak, and the private part."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_memory, _settings(task), spec).result()


def _settings(task: Task) -> dict[str, Any]:
    return {name: getattr(task, name) for name in task.__dataclass_fields__ if name != "shards"}


def _memory(settings: dict[str, Any], spec: str) -> dict[str, float]:
    loader = Task(ShardSet(spec), **settings).loader()
    before = machine.memory_mb()
    for _ in zip(range(24), loader.forever(), strict=False):
        pass
    after = machine.memory_mb()
    return {"peak": after["VmHWM"], "private": after["RssAnon"], "private_before": before["RssAnon"]}
