"""Shards in a bucket or on the web, read by position: from the local cache if present, otherwise by byte ranges."""

import io
import logging
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from . import remote, tar
from .shard_cache import Cache, Figures
from .shards import OpenShards

_NEAR = 1 << 16  # images with gaps of at most so many bytes share one request
_MAX_REQUESTED = 1024  # minimum for the limit of requested images
_log = logging.getLogger(__name__)


class RemoteFiles(OpenShards):
    """Shards read from the local cache if present, otherwise over the network."""

    def __init__(self, objects: Sequence[remote.Object], cache: Cache):
        super().__init__()
        self.cache = cache
        self._objects = objects
        self._requested: OrderedDict[tuple[int, int], tuple[Future[bytes], int]] = OrderedDict()
        weakref.finalize(self, cache.stop)

    def _descriptor(self, shard: int) -> int | None:
        return self.cache.open(shard)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Return `size` bytes of a shard from `offset`; fewer at its end. Raises ReadError."""
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
        """Request images (rows of tables.SAMPLE), all at once, before they are read one by one."""
        for near in _merged(sorted(self._read_ahead(rows))):
            shard, start, _ = near[0]
            stop = near[-1][1] + near[-1][2]
            future = remote.submit(self._objects[shard].read(start, stop))
            self.cache.count(Figures(fetched=stop - start))
            with self._lock:
                self._requested.update({(shard, offset): (future, start) for _, offset, _ in near})
        with self._lock:
            while len(self._requested) > max(_MAX_REQUESTED, 8 * len(rows)):  # left over from discarded batches
                self._requested.popitem(last=False)

    @property
    def figures(self) -> Figures:
        return self.cache.figures

    def expect(self, order: Sequence[int], ahead: int) -> None:
        """Call `Cache.expect` and close other shards: a deleted file takes disk space while it is open."""
        self.cache.expect(order, ahead)
        kept = set(order[:ahead])
        with self._lock:
            for shard in [s for s in self._open if s not in kept]:
                del self._open[shard]

    def open(self, shard: int) -> BinaryIO:
        """Open a shard for reading from its start."""
        fd = self.cache.open(shard)
        return os.fdopen(fd, "rb") if fd is not None else io.BufferedReader(remote.Reader(self._objects[shard]))

    def _from_disk(self, shard: int, offset: int, size: int) -> bytes | None:
        file = self._file(shard)
        if file is None:
            return None
        try:
            data = tar.read_at(file.fd, offset, size)
        except OSError as error:  # a failing local disk says nothing about the shard
            _log.warning("%s: %s; reading it over the network", self._objects[shard], error.strerror)
            return None
        if len(data) < min(size, self._objects[shard].size - offset):
            return None
        self.cache.count(Figures(from_cache=1))
        return data


def _merged(wanted: Iterable[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Group (shard, offset, size) in rising order into lists of near neighbours that span at most PART bytes."""
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
