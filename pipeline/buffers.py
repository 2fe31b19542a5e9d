"""Memory for batches that is used again once nobody holds a tensor of it.

Fresh memory costs a page fault for every 4 KiB at its first use: more than filling it does.
"""

import weakref
from collections import deque

import torch
from torch import Tensor

_SPARE = 2  # a loop drops one batch when it takes the next


class Buffers:
    """Tensors of one shape and type, on the host. A few are kept while nobody uses them."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self._shape, self._dtype = shape, dtype
        self._free = deque[Tensor](maxlen=_SPARE)

    def take(self) -> Tensor:
        """A tensor with arbitrary contents, the caller's for as long as it, or any view of it, lives."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = torch.empty(self._shape, dtype=self._dtype)
        # The tensor made of an array holds that very array, as do all that share its memory: when the array is gone,
        # nobody has the memory any more. NumPy has no bfloat16, and needs none: the bytes are what is shared.
        array = memory.view(torch.uint8).numpy()
        weakref.finalize(array, self._free.append, memory).atexit = False
        return torch.from_numpy(array).view(self._dtype)
