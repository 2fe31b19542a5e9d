"""What a step costs: operations, counted without computing them, the share of a GPU's peak they are, and a trial."""

import itertools
import time

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline import Batch, Recipe, View
from trainer.metrics import memory_gb
from trainer.step import TrainingStep

# Dense bf16 tensor-core peaks in FLOP/s, from NVIDIA's data sheets, by a part of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40": 181e12, "L4": 121e12, "V100": 125e12}


def synthetic(recipe: Recipe, count: int, device: torch.device | str) -> Batch:
    """A batch of `count` images of noise, every view showing the whole image, with the recipe's own targets."""
    windows = {cut.kind: np.tile(np.array([0, 0, 256, 256], np.float32), (count, cut.count, 1)) for cut in recipe.cuts}
    targets = recipe.targets(windows) if recipe.targets else {}
    views = {
        cut.kind: View(
            torch.randint(256, (count, cut.count, cut.size, cut.size, 3), dtype=torch.uint8, device=device),
            torch.from_numpy(windows[cut.kind]),
        )
        for cut in recipe.cuts
    }
    label = torch.full((count,), -1)
    return Batch(views, {k: torch.from_numpy(t) for k, t in targets.items()}, label, torch.arange(count)).to(device)


def flops_per_image(method: nn.Module, recipe: Recipe, count: int = 4) -> float:
    """Operations of one forward and backward pass per image: products and convolutions, a multiply-add as two.

    Counted on tensors that have a shape and no contents, in a second or two and without memory or a trace in `method`,
    which must not be compiled or sharded yet.
    """
    counter, fake = FlopCounterMode(display=False), FakeTensorMode(allow_non_fake_inputs=True)
    weights = {**dict(method.named_parameters()), **dict(method.named_buffers())}
    shapes: dict[str, torch.Tensor] = {name: fake.from_tensor(value) for name, value in weights.items()}
    device = next(iter(weights.values())).device
    with fake, counter:
        arguments = (synthetic(recipe, count, device), torch.zeros((), device=device))
        torch.func.functional_call(method, shapes, arguments)[0].backward()
    return counter.get_total_flops() / count


def dry_run(step: TrainingStep, recipe: Recipe, count: int, device: torch.device, flops: float) -> str:
    """Runs three steps whose micro-batches are `count` images of noise; the last one's time, memory and operations."""
    batches, progress = itertools.repeat(synthetic(recipe, count, device)), torch.zeros((), device=device)
    for _ in range(3):
        start = time.perf_counter()
        images = len(step(batches, progress).index)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return (
        f"{images} images: {1e3 * seconds:.0f} ms, {images / seconds:.3g} images/s, {memory_gb(device):.2f} GB peak, "
        f"{flops / 1e9:.3g} GFLOP an image, {flops * images / seconds / 1e12:.3g} TFLOP/s"
    )


def peak_flops(device: torch.device) -> float | None:
    """The GPU's bf16 peak in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
