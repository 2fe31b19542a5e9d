"""Normalisation of uint8 pixels: (level / 255 - mean) / std per channel, in float32, rounded once to the output type.

A channel has only 256 levels, so a CPU uses a lookup table. Every type costs the same and equals torch's result.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Pixels = Literal["uint8", "float16", "bfloat16", "float32"]

_WORDS = {2: torch.uint16, 4: torch.uint32}  # integer type of table elements by size: NumPy has no bfloat16


def normalise(
    pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, *, compiled: bool = False
) -> Tensor:
    """Normalise u8 (B, V, H, W, 3) to (B, V, 3, H, W) of `dtype`; `mean` and `std` refer to pixels in [0, 1].

    `compiled` fuses the steps for a GPU into one kernel, compiled at the first call for each shape.
    """
    if pixels.device.type == "cpu" and dtype.itemsize in _WORDS:
        return _looked_up(pixels, table(tuple(mean), tuple(std), dtype), dtype)
    shift, scale = (pixels.new_tensor(tuple(numbers), dtype=torch.float32)[:, None, None] for numbers in (mean, std))
    return (_compiled() if compiled else _formula)(pixels.movedim(-1, 2), shift, scale, dtype)


def _formula(levels: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    x = levels.to(torch.float32, memory_format=torch.contiguous_format)
    return ((x / 255 - shift) / scale).to(dtype)


@cache
def _compiled() -> Any:
    many = torch._dynamo.config.patch(recompile_limit=256)  # each kind of view and batch size has its own graph
    return many(torch.compile(_formula, dynamic=False, fullgraph=True))


@cache
def table(mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Return the normalised value of each level of each channel: (3, 256) integers with the bits of `dtype`."""
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 256)[..., None]
    shift, scale = (torch.tensor(numbers)[:, None, None] for numbers in (mean, std))
    return _formula(levels, shift, scale, dtype)[..., 0].contiguous().view(_WORDS[dtype.itemsize])


def _looked_up(pixels: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    from .cutting import look_up  # lazy: imports numba

    batch, views, height, width, _ = pixels.shape
    out = torch.empty(batch, views, 3, height, width, dtype=dtype)
    source, target, names = pixels.numpy(), out.view(words.dtype).numpy(), words.numpy()

    def convert(first: int) -> None:
        for b in range(first, batch, threads):
            for v in range(views):
                look_up(target[b, v], source[b, v], names)

    threads = max(1, min(torch.get_num_threads(), batch))
    if threads == 1:
        convert(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(convert, range(threads)))
    return out
