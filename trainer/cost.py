"""Cost of a training step: operations and memory, estimated without computing, and a trial run on noise."""

import itertools
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pipeline import Batch, Recipe, View, host
from trainer import parallel
from trainer.backbones import checkpoint_activations_
from trainer.config import UsageError
from trainer.method import Method
from trainer.metrics import memory_gb
from trainer.step import TrainingStep

# Dense bf16 tensor-core peaks in FLOP/s, from NVIDIA's data sheets, keyed by a part of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40": 181e12, "L4": 121e12, "V100": 125e12}


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(_: Any, query: torch.Size, key: torch.Size, value: torch.Size, *__: Any, **___: Any) -> int:
    return 2 * sdpa_flop_count(query, key, value)


_ops = torch.ops.aten
# Torch does not count the CPU's attention. For a GPU, it also counts the scores that the backward kernels recompute.
ATTENTION: dict[Any, Any] = {
    _ops._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ops._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _ops._scaled_dot_product_flash_attention_backward: _attention_backward,
    _ops._scaled_dot_product_efficient_attention_backward: _attention_backward,
    _ops._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}


def synthetic(recipe: Recipe, count: int, device: torch.device | str) -> Batch:
    """Return a batch of `count` images of noise. Every view shows the whole image; targets are the recipe's."""
    windows = {cut.kind: np.tile(np.array([0, 0, 256, 256], np.float32), (count, cut.count, 1)) for cut in recipe.cuts}
    targets = recipe.targets(windows) if recipe.targets else {}
    views = {
        cut.kind: View(
            torch.randint(256, (count, cut.count, cut.size, cut.size, 3), dtype=torch.uint8, device=device),
            torch.from_numpy(windows[cut.kind]),
            torch.zeros(count, cut.count, cut.size, cut.size, dtype=torch.uint8, device=device)
            if recipe.masks
            else None,
        )
        for cut in recipe.cuts
    }
    label = torch.full((count,), -1)
    return Batch(views, {k: torch.from_numpy(t) for k, t in targets.items()}, label, torch.arange(count)).to(device)


@dataclass(frozen=True)
class Estimate:
    """The cost of a method, counted on fake tensors (shapes without data), before the real method is built."""

    flops_per_image: float
    """operations of one forward and backward pass: matrix products and convolutions, a multiply-add counts twice"""
    memory: float
    """bytes per rank: weights, gradients, optimizer state, and the peak of other tensors in a pass"""


def estimate(
    build: Callable[[], Method],
    recipe: Recipe,
    count: int,
    device: torch.device | str,
    *,
    states: int = 2,
    checkpointing: bool = False,
) -> Estimate:
    """Estimate the cost, in fp32, of micro-batches of `count` images with `states` optimizer numbers per parameter.

    If the method cannot run on fake tensors, the estimate is 0, with a warning. Such a method may still train.
    """
    try:
        with torch.device("meta"):
            method = build()
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in method.modules():
                for name, p in [*module.named_parameters(recurse=False)]:
                    setattr(module, name, torch.nn.Parameter(torch.empty_like(p, device=device), p.requires_grad))
                for name, b in [*module.named_buffers(recurse=False)]:
                    setattr(module, name, torch.empty_like(b, device=device))
            counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
            peak = _Peak([*method.parameters(), *method.buffers()])
            if checkpointing:  # count operations without the recomputation, but memory with it
                with counter:
                    _forward_and_backward(method, synthetic(recipe, count, device))
                checkpoint_activations_(method)
            with peak, nullcontext() if checkpointing else counter:
                _forward_and_backward(method, synthetic(recipe, count, device))
    except Exception as error:  # a failed estimate must not stop the run
        warnings.warn(f"the cost of a step is not known: {' '.join(str(error).split())[:200]}", stacklevel=2)
        return Estimate(0.0, 0.0)
    state = states * sum(p.nbytes for p in method.parameters() if p.requires_grad)
    return Estimate(counter.get_total_flops() / count, peak.most + state)


def _forward_and_backward(method: Method, batch: Batch) -> None:
    method(batch, torch.zeros((), device=batch.label.device))[0].backward()
    method.zero_grad()


class _Peak(TorchDispatchMode):
    """Records the peak number of bytes held by `tensors` and all tensors created under this mode."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.now = self.most = sum(t.nbytes for t in tensors)
        self._known = weakref.WeakSet(t.untyped_storage() for t in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def require_memory(needed: float, remedy: str) -> None:
    """Raise UsageError if this machine has fewer than `needed` bytes free. `remedy` becomes part of the message."""
    left = host.memory()
    if left is not None and needed > left:
        raise UsageError(
            f"this run needs at least {needed / 1e9:.1f} GB of memory, and {left / 1e9:.1f} GB are free: lower "
            f"batch_size, raise speed.accumulate, or {remedy}"
        )


def too_long(estimate: Estimate, images: float, ranks: int, remedy: str) -> list[str]:
    """Return a warning, or [], if `images` take more than 24 hours on a CPU shared by `ranks`.

    The estimate is a lower bound: it counts matrix products only, at a speed measured in this call.
    """
    a, times = torch.ones(1024, 1024), []
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    hours = estimate.flops_per_image * images / ranks / (2 * 1024**3 / min(times)) / 3600
    memory = f"{estimate.memory * ranks / 1e9:.1f} GB of memory"
    text = f"on this CPU the run takes at least {hours:,.0f} hours and {memory}: it needs GPUs; {remedy}"
    return [text] if hours > 24 else []


def dry_run(step: TrainingStep, recipe: Recipe, count: int, device: torch.device, flops: float) -> None:
    """Run three steps on micro-batches of `count` images of noise, and print the time and memory of the last one."""
    batches, progress = itertools.repeat(synthetic(recipe, count, device)), torch.zeros((), device=device)
    for _ in range(3):
        start = time.perf_counter()
        images = len(step(batches, progress).index)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    if parallel.rank() == 0:
        print(
            f"{images} images: {1e3 * seconds:.0f} ms, {images / seconds:.3g} images/s, {memory_gb(device):.2f} GB "
            f"peak, {flops / 1e9:.3g} GFLOP an image, {flops * images / seconds / 1e12:.3g} TFLOP/s"
        )


def peak_flops(device: torch.device) -> float | None:
    """Return the GPU's bf16 peak in FLOP/s, or None if it is unknown or `device` is a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
