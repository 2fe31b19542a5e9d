"""Compilation of numba kernels: one decorator for all of them, and one cache folder for the compiled code.

numba invalidates a cached kernel only if the file of that function changes, but constants and kernels from other files
are compiled in. The folder's name is therefore a hash of all files in COMPILED.
"""

import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core import event

from .host import cache_folder

# The modules that are compiled into kernels.
COMPILED = ("correspondence", "cutting", "draws", "jitter", "kernel", "order", "parameters", "plan", "simd")
_UNUSED = 30 * 24 * 3600.0  # seconds without use after which another version's folder is removed
_config: Any = numba.config
_lock = threading.RLock()


class _Announcement(event.Listener):
    """Logs once that kernels are being compiled, which can take minutes on a slow machine.

    It is a log message, so a program can turn it off. Only local rank 0 logs it.
    """

    _said = False

    def on_start(self, event: event.Event) -> None:
        ours = event.data["dispatcher"].py_func.__module__.partition(".")[0] == __package__
        if ours and not self._said and os.environ.get("LOCAL_RANK", "0") == "0":
            self._said = True
            logging.getLogger(__package__).warning("compiling kernels; they are kept for the next time")

    def on_end(self, event: event.Event) -> None:
        pass


event.register("numba:compile", _Announcement())


def kernel(function: Callable[..., Any]) -> Any:
    """Compile `function` with numba, without the GIL and cached on disk."""
    with kept() as possible:
        return numba.njit(cache=possible, nogil=True)(function)


@contextmanager
def kept() -> Iterator[bool]:
    """Make numba cache in this package's folder within the context. Yields False if there is no writable folder.

    Without a folder each process compiles the kernels again, which costs it some seconds and nothing else.
    """
    with _lock:
        before, folder = _config.CACHE_DIR, _folder()
        _config.CACHE_DIR = str(folder or "")
        try:
            yield folder is not None
        finally:
            _config.CACHE_DIR = before


def _remove_unused(place: Path) -> None:
    for folder in place.glob("kernels-*"):
        with suppress(OSError):  # another process may be removing it
            if folder.stat().st_mtime < time.time() - _UNUSED:
                shutil.rmtree(folder)


@cache
def _folder() -> Path | None:
    here = Path(__file__).parent
    digest = hashlib.blake2b(numba.__version__.encode(), digest_size=8)
    for name in COMPILED:
        digest.update((here / f"{name}.py").read_bytes())
    for place in (lambda: Path(_config.CACHE_DIR or here / "__pycache__"), lambda: cache_folder("kernels")):
        with suppress(OSError):
            folder = place() / f"kernels-{digest.hexdigest()}"
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            os.utime(folder)  # marks the folder as used
            _remove_unused(folder.parent)
            return folder
    return None
