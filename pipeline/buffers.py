"""Memory for batches that is reused once no tensor references it.

Fresh memory costs a page fault for every 4 KiB at its first use, which takes longer than filling it.
"""

import weakref
from collections import deque

import torch
from torch import Tensor

_SPARE = 2  # unused tensors to keep: a loop drops one batch when it takes the next


class Buffers:
    """A pool of host tensors of one shape and type. It keeps a few unused tensors."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self._shape, self._dtype = shape, dtype
        self._free = deque[Tensor](maxlen=_SPARE)

    def take(self) -> Tensor:
        """Return a tensor with arbitrary contents. Its memory is reused after the tensor and all its views are gone."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = torch.empty(self._shape, dtype=self._dtype)
        # A tensor made from an array references that array, as do all tensors that share its memory. Once the array is
        # gone, the memory is unused. The array is of bytes, since NumPy has no bfloat16.
        array = memory.view(torch.uint8).numpy()
        weakref.finalize(array, self._free.append, memory).atexit = False
        return torch.from_numpy(array).view(self._dtype)
