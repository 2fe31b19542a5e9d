"""How this package compiles: one decorator for every numba kernel."""

from collections.abc import Callable
from typing import Any

from numba import njit


def kernel(function: Callable[..., Any]) -> Any:
    """`function` compiled without the interpreter lock, and kept on disk where a cache directory can be written.

    numba refuses to decorate at all where no cache directory is writable (a read-only installation without a home):
    there each process compiles anew, which costs it some seconds and nothing else.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)
