"""Shards in a bucket or on the web, read by position: from this disk where they lie there, else by ranges."""

import io
import logging
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from . import remote, tar
from .shard_cache import Cache, Figures
from .shards import most_open

_NEAR = 1 << 16  # images this near to each other are read by one request
_MAX_REQUESTED = 1024  # images on their way, at least
_log = logging.getLogger(__name__)


class _Descriptor:
    __slots__ = ("fd",)

    def __init__(self, fd: int):
        self.fd = fd

    def __del__(self) -> None:  # not before the last reader lets go
        os.close(self.fd)


class RemoteFiles:
    """Shards read by position, from the disk where they lie there. Safe to use from several threads."""

    def __init__(self, objects: Sequence[remote.Object], cache: Cache):
        self.cache = cache
        self._objects = objects
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._requested: OrderedDict[tuple[int, int], tuple[Future[bytes], int]] = OrderedDict()
        self._lock = threading.Lock()
        self._most = most_open()
        weakref.finalize(self, cache.stop)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard; fewer where it ends. Raises ReadError."""
        if self.cache.failure:
            raise self.cache.failure
        with self._lock:
            requested = self._requested.pop((shard, offset), None)
        if requested is None and (data := self._from_disk(shard, offset, size)) is not None:
            return data
        future, start = requested or (remote.submit(self._objects[shard].read(offset, offset + size)), offset)
        began = time.perf_counter()
        data = remote.wait(future)
        fetched = 0 if requested else len(data)
        self.cache.count(Figures(by_range=1, fetched=fetched, waited=time.perf_counter() - began))
        return data[offset - start : offset - start + size]

    def advise(self, rows: NDArray[np.void]) -> None:
        """Asks for images (of tables.SAMPLE), all at once, before they are read one by one."""
        missing = []
        for shard, offset, size in zip(*(rows[name].tolist() for name in ("shard", "offset", "size")), strict=True):
            file = self._file(shard)
            if file is None:
                missing.append((shard, offset, size))
                continue
            with suppress(OSError):  # the read that follows says what is wrong
                os.posix_fadvise(file.fd, offset, size, os.POSIX_FADV_WILLNEED)
        for near in _merged(sorted(missing)):
            shard, start, _ = near[0]
            stop = near[-1][1] + near[-1][2]
            future = remote.submit(self._objects[shard].read(start, stop))
            self.cache.count(Figures(fetched=stop - start))
            with self._lock:
                self._requested.update({(shard, offset): (future, start) for _, offset, _ in near})
        with self._lock:
            while len(self._requested) > max(_MAX_REQUESTED, 8 * len(rows)):  # of batches that were given up
                self._requested.popitem(last=False)

    def name(self, shard: int, offset: int) -> str | None:
        """The name of the member whose content starts at `offset`; None where that cannot be said. Raises OSError."""
        start = max(0, offset - tar.NEAR)
        return tar.name_before(self.read(shard, start, offset - start)) or self.names(shard).get(offset)

    def names(self, shard: int) -> dict[int, str]:
        """The names of all members by the offset of their content, by a walk; none where the shard is not on disk."""
        file = self._file(shard)
        return {} if file is None else tar.names(self.cache.path(shard), file.fd)

    @property
    def figures(self) -> Figures:
        return self.cache.figures

    def expect(self, order: Sequence[int], ahead: int) -> None:
        """As `Cache.expect` says. Other shards are closed: a deleted file takes its space while anybody has it open."""
        self.cache.expect(order, ahead)
        kept = set(order[:ahead])
        with self._lock:
            for shard in [s for s in self._open if s not in kept]:
                del self._open[shard]

    def open(self, shard: int) -> BinaryIO:
        """A shard, to be read from its start."""
        fd = self.cache.open(shard)
        return os.fdopen(fd, "rb") if fd is not None else io.BufferedReader(remote.Reader(self._objects[shard]))

    def _from_disk(self, shard: int, offset: int, size: int) -> bytes | None:
        file = self._file(shard)
        if file is None:
            return None
        try:
            data = os.pread(file.fd, size, offset)
        except OSError as error:  # a bad disk here says nothing about the shard
            _log.warning("%s: %s; reading it over the network", self._objects[shard], error.strerror)
            return None
        if len(data) < min(size, self._objects[shard].size - offset):
            return None
        self.cache.count(Figures(from_cache=1))
        return data

    def _file(self, shard: int) -> _Descriptor | None:
        with self._lock:
            file = self._open.pop(shard, None)
            if file is None and (fd := self.cache.open(shard)) is not None:
                file = _Descriptor(fd)
            if file:
                self._open[shard] = file
            if len(self._open) > self._most:
                self._open.popitem(last=False)
            return file


def _merged(wanted: Iterable[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """(shard, offset, size) in rising order, those that lie near each other in one list, of at most a part's bytes."""
    near: list[tuple[int, int, int]] = []
    for shard, offset, size in wanted:
        if near:
            first, last = near[0], near[-1]
            if shard != first[0] or offset > last[1] + last[2] + _NEAR or offset + size > first[1] + remote.PART:
                yield near
                near = []
        near.append((shard, offset, size))
    if near:
        yield near
