"""Arrays on disk that are filled in any number of sittings, and a name for all that decides what is in them."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import nn

Layout = Mapping[str, tuple[DTypeLike, tuple[int, ...]]]  # type and shape of each array


def fingerprint(network: nn.Module, *settings: Any) -> str:
    """A name of 16 hexadecimal digits made of every weight of `network` and of `settings`, which JSON can hold."""
    found = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8)
    for name, weight in network.state_dict().items():
        found.update(name.encode() + weight.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def arrays(folder: Path | None, layout: Layout) -> dict[str, NDArray[Any]]:
    """The arrays in `folder`, memory-mapped for reading and writing: found there, or new and zero. None: in memory.

    Their space is taken at once, since a disk that fills up later would kill the process that writes through a map.
    Raises OSError where the disk is too small or refuses, ValueError for files that are something else.
    """
    if folder is None:
        return {name: np.zeros(shape, kind) for name, (kind, shape) in layout.items()}
    if not folder.exists():
        beside = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        try:
            beside.mkdir(parents=True)
            for name, (kind, shape) in layout.items():
                path = beside / f"{name}.npy"
                np.lib.format.open_memmap(path, "w+", kind, shape)
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            beside.rename(folder)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    for name, (kind, shape) in layout.items():
        try:
            there = np.load(folder / f"{name}.npy", "r")  # "r+" would lengthen a file that was cut
        except (EOFError, ValueError) as error:
            raise ValueError(f"{folder}: holds damaged arrays ({error}); remove it") from None
        if (there.dtype, there.shape) != (np.dtype(kind), shape):
            raise ValueError(f"{folder}: holds arrays of other types or shapes; remove it")
    return {name: np.load(folder / f"{name}.npy", "r+") for name in layout}


def keep(found: Mapping[str, NDArray[Any]], filled: int) -> None:
    """Writes what is in the arrays to the disk, and then to the array ``filled``, i64 (1,), how many rows they hold.

    In this order: a power cut may lose rows, but never call lost ones filled.
    """
    for name, part in found.items():
        if name != "filled":
            _flush(part)
    found["filled"][0] = filled
    _flush(found["filled"])


def _flush(array: NDArray[Any]) -> None:
    if isinstance(array, np.memmap):
        array.flush()
