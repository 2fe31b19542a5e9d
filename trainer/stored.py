"""Resumable arrays on disk, and a fingerprint of everything that determines their contents."""

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
    """Return a hash, 16 hexadecimal digits, of all weights of `network` and of `settings`, which must fit into JSON."""
    found = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8)
    for name, weight in network.state_dict().items():
        found.update(name.encode() + weight.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def arrays(folder: Path | None, layout: Layout) -> dict[str, NDArray[Any]]:
    """Open the arrays in `folder`, memory-mapped for reading and writing. Create them, filled with 0, if it is missing.

    With `folder` None they are in memory. Disk space is allocated at once, because a full disk would later kill the
    process that writes through the map. Raises OSError if the disk is too small or cannot be written, and ValueError if
    the files are damaged or have other types or shapes.
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
    """Flush the arrays to disk, then set the array ``filled``, i64 (1,), to the number `filled` of valid rows.

    The order ensures that a power cut may lose rows, but never leaves lost rows marked as filled.
    """
    for name, part in found.items():
        if name != "filled":
            _flush(part)
    found["filled"][0] = filled
    _flush(found["filled"])


def _flush(array: NDArray[Any]) -> None:
    if isinstance(array, np.memmap):
        array.flush()
