"""How this package compiles: one decorator for every numba kernel, and one folder for what it compiled.

numba asks of a kept kernel only whether the file of that one function has changed, but constants and kernels of other
files are compiled in. The folder is therefore named by all that can be.
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

# Files that go into kernels.
COMPILED = ("correspondence", "cutting", "draws", "jitter", "kernel", "order", "parameters", "plan", "simd")
_UNUSED = 30 * 24 * 3600.0  # seconds without use after which another version's folder is removed
_config: Any = numba.config
_lock = threading.RLock()


class _Announcement(event.Listener):
    """Says once why a process is silent for a while: on a slow machine kernels take minutes to compile.

    As a log message, so that a program can turn it off; of one rank of a machine.
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
    """`function` compiled without the interpreter lock, and kept on disk."""
    with kept() as possible:
        return numba.njit(cache=possible, nogil=True)(function)


@contextmanager
def kept() -> Iterator[bool]:
    """While it is open, numba keeps in this package's folder what it is asked to cache; False: there is no such folder.

    Without one each process compiles for itself, which costs it some seconds and nothing else.
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
        with suppress(OSError):  # another process may be at it
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
            os.utime(folder)  # used today
            _remove_unused(folder.parent)
            return folder
    return None
