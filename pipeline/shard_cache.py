"""A local cache of remote shards, which are downloaded whole and ahead of use.

The order in which an epoch uses the shards is known, so the next shards are prefetched in that order. To make space,
the cache evicts the shard whose next use is last, which is Belady's optimum. LRU eviction would hardly ever hit for a
set larger than the cache, since each shard is used once per epoch.

The processes of a machine share only the cache folder. The process that holds the folder's lock downloads and deletes.
The others read the files, and one of them takes over when the holder ends, however it ends. A file gets its final name
once it is complete, verified and durable. Each set has its own folder. Only files with names that this module gives are
ever deleted there.
"""

import hashlib
import logging
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from . import host, remote
from .shards import ReadError

FREE = 1 << 30
"""Bytes of the disk to leave free, since checkpoints and logs may be on the same disk."""
_CONNECTIONS = 16  # parts in flight; only one process of a machine downloads
_PATIENCE = 10.0  # seconds between attempts if a download fails or another process holds the lock
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Figures:
    """The cost so far of reading a remote set in this process."""

    from_cache: int = 0
    """Number of images read from the cache."""
    by_range: int = 0
    """Number of images read over the network."""
    fetched: int = 0
    """Bytes requested over the network."""
    waited: float = 0.0
    """Seconds that threads waited for the network, summed over threads."""

    def __sub__(self, other: "Figures") -> "Figures":
        return Figures(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass
class Job:
    """An object to download whole into a file, and its expected SHA-256 if known."""

    number: int
    wanted: remote.Object
    path: Path
    sha256: str | None = None
    _file: int = -1
    _written: int = 0
    _sum: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    @property
    def part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    def begin(self) -> None:
        self._file = os.open(self.part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

    def write(self, data: bytes) -> bool:
        """Write the next part. Returns whether the file is now complete. Raises OSError and BadSum."""
        self._sum.update(data)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self._written += len(data)
        if self._written < self.wanted.size:
            return False
        if self.sha256 and self._sum.hexdigest() != self.sha256:
            raise BadSum(self)
        return True

    def finish(self) -> None:
        """Sync a complete file to disk and give it its final name. Raises OSError."""
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        self.part.replace(self.path)  # the folder is not synced: a rename lost in a crash costs one more download

    def drop(self) -> None:
        """Delete the file if it is incomplete."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            with suppress(OSError):
                self.part.unlink()


class BadSum(Exception):
    """A shard was downloaded whole, but its SHA-256 differs from its manifest's."""

    def __init__(self, job: Job):
        super().__init__(job)
        self.job = job

    def explained(self) -> ReadError:
        wanted = self.job.wanted
        found = ReadError(f"{wanted} arrived twice with another sha256 than its manifest says: upload it again")
        found.passes = False
        return found


def fetch(
    jobs: Iterator[Job],
    count: Callable[[Figures], object] = lambda more: None,
    stopped: threading.Event | None = None,
) -> Iterator[Job]:
    """Download objects into files, several parts at a time, and yield each job whose file is complete, in order.

    The next job is taken from the iterator when a connection is free. Downloads do not wait for fsync. Exceptions of
    `Object.read`, `Job.write` and `Job.finish` propagate. Incomplete files are deleted then, and when `stopped` is set.
    """
    under_way: deque[tuple[Job, Future[bytes]]] = deque()
    complete: deque[tuple[Job, Future[None]]] = deque()
    begun: list[Job] = []

    def parts() -> Iterator[tuple[Job, Future[bytes]]]:
        for job in jobs:
            begun.append(job)
            job.begin()
            for start in range(0, job.wanted.size, remote.PART):
                yield job, remote.submit(job.wanted.read(start, start + remote.PART))

    requests, disk = parts(), ThreadPoolExecutor(_CONNECTIONS)
    try:
        while not (stopped and stopped.is_set()):
            while len(under_way) < _CONNECTIONS and (request := next(requests, None)):
                under_way.append(request)
            while complete and (complete[0][1].done() or not under_way or len(complete) > _CONNECTIONS):
                job, named = complete.popleft()
                named.result()
                begun.remove(job)
                yield job
            if not under_way:
                return
            job, future = under_way.popleft()
            data = remote.wait(future)
            count(Figures(fetched=len(data)))
            if job.write(data):
                try:
                    complete.append((job, disk.submit(job.finish)))
                except RuntimeError:  # the interpreter is shutting down
                    return
    finally:
        for _, future in under_way:
            future.cancel()
        disk.shutdown()
        for job in begun:
            job.drop()


class Cache:
    """The cache folder of one set, of at most `size` bytes, and the thread that fills it.

    `expect` announces the next shards. `failure` is the error that ended the thread: a shard whose SHA-256 differed
    from its manifest's twice. Without a `root`, or with a `size` of 0, nothing is cached.
    """

    def __init__(self, root: Path | None, objects: Sequence[remote.Object], sums: Sequence[str | None], size: int):
        self.failure: ReadError | None = None
        self.figures = Figures()
        self.closed = False
        """Whether downloads have ended permanently. Files in the cache are still read."""
        self._objects, self._sums, self._size = objects, sums, size
        self._order: list[int] = []
        self._ahead = 0
        self._condition = threading.Condition()
        self._changed = False
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._counting = threading.Lock()
        self._lock = ExitStack()
        self._owner = False
        self._retried: set[int] = set()  # shards that were downloaded once with a wrong SHA-256
        what = [[o.name, o.size, s or o.version] for o, s in zip(objects, sums, strict=True)]
        self.folder = root / host.digest(what) if root and size else None
        if self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                self._close(f"{self.folder} cannot be made ({error.strerror})")

    def count(self, more: Figures) -> None:
        with self._counting:
            self.figures += more

    def open(self, shard: int) -> int | None:
        """Open a shard and return its file descriptor, or None if it is not completely in the cache."""
        if self.folder is None:
            return None
        try:
            file = os.open(self.path(shard), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        if os.fstat(file).st_size == self._objects[shard].size:
            return file
        os.close(file)
        return None

    def expect(self, order: Iterable[int], ahead: int) -> None:
        """Set the shards in the order of their next use. The first `ahead` are downloaded; others may be evicted."""
        if self.folder is None or self.closed:
            return
        with self._condition:
            self._order, self._ahead, self._changed = list(order), ahead, True
            self._condition.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shards", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop the thread, which then releases the folder."""
        self._stopped.set()
        with self._condition:
            self._condition.notify()

    def owned(self) -> bool:
        """Return whether this process holds the folder's lock, after trying to take it. Raises OSError."""
        if self.folder and not self._owner:
            with suppress(BlockingIOError):
                self._lock.enter_context(host.lock(self.folder / "lock"))
                self._owner = True
                for part in self._held(".tar.part").values():  # left by a killed process
                    part.unlink(missing_ok=True)
        return self._owner

    def release(self) -> None:
        """Release the folder's lock."""
        self._owner = False
        self._lock.close()

    def make_space(self, shard: int) -> bool:
        """Make space for a shard by evicting shards that are used later. Returns whether it fits. Raises OSError."""
        if self.closed or not self.folder:
            return False
        wanted = self._objects[shard].size
        unfinished = self._held(".tar.part").keys() - {shard}  # listed first: a file may be renamed in between
        complete = self._held(".tar").keys() - {shard}
        held = sum(self._objects[s].size for s in complete | unfinished)
        excess = max(held + wanted - self._size, wanted + FREE - shutil.disk_usage(self.folder).free)
        with self._condition:
            next_use = {s: k for k, s in reversed(list(enumerate(self._order)))}
            soon = set(self._order[: self._ahead])
        for later in sorted(complete - soon, key=lambda s: next_use.get(s, len(next_use)), reverse=True):
            if excess <= 0:
                break
            self.path(later).unlink(missing_ok=True)
            excess -= self._objects[later].size
        if excess > 0 and not complete | unfinished:
            self._close(f"{self.folder} has no space for a shard of {wanted / 1e9:.2f} GB")
        return excess <= 0

    def job(self, shard: int, aside: Path | None = None) -> Job:
        """Return a job that downloads a shard to this folder, or to the folder `aside`."""
        path = aside / f"{shard:06d}.tar" if aside else self.path(shard)
        return Job(shard, self._objects[shard], path, self._sums[shard])

    def path(self, shard: int) -> Path:
        assert self.folder
        return self.folder / f"{shard:06d}.tar"

    def _held(self, ending: str) -> dict[int, Path]:
        """Return this cache's own files with this extension, by shard."""
        assert self.folder
        mine = {f"{shard:06d}{ending}": shard for shard in range(len(self._objects))}
        return {mine[path.name]: path for path in self.folder.iterdir() if path.name in mine}

    def _is_complete(self, shard: int) -> bool:
        try:
            return self.path(shard).stat().st_size == self._objects[shard].size
        except OSError:
            return False

    def _close(self, why: str) -> None:
        _log.warning("the shard cache is off from here on, images are read one by one over the network: %s", why)
        self.closed = True

    def _run(self) -> None:
        while not self._stopped.is_set() and not self.closed:
            with self._condition:
                self._changed = False
            pause = None
            try:
                if self.owned():
                    for job in fetch(self._missing(), self.count, self._stopped):
                        _log.debug("%s is in %s", job.wanted, job.path)
                else:
                    pause = _PATIENCE
            except ReadError as error:  # a reader that needs the shard now fails as well and reports it
                _log.warning("%s; trying again", error)
                pause = _PATIENCE
            except BadSum as bad:
                if bad.job.number in self._retried:
                    self.failure = bad.explained()
                    break
                _log.warning("%s arrived with another sha256 than its manifest says: fetching it again", bad.job.wanted)
                self._retried.add(bad.job.number)
                continue
            except OSError as error:
                self._close(f"{self.folder}: {error.strerror}")
            with self._condition:
                if not (self._changed or self.closed or self._stopped.is_set()):
                    self._condition.wait(pause)
        self.release()

    def _missing(self) -> Iterator[Job]:
        """Yield jobs for the missing ones of the next shards. `expect` may change the next shards in between."""
        begun: set[int] = set()
        while True:
            with self._condition:
                soon = self._order[: self._ahead]
            shard = next((s for s in soon if s not in begun and not self._is_complete(s)), None)
            if shard is None or not self.make_space(shard):
                return
            begun.add(shard)
            yield self.job(shard)
