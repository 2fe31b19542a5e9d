"""Remote shards on this machine's disk, fetched whole and ahead of need.

The order in which an epoch needs the shards is known, so the next ones are fetched in that order. Each is used once an
epoch: then filling the disk and keeping what lies there is the best that any policy can do (Belady's optimum), where
the least recently used would go, almost nothing of a set larger than the disk would ever be found again. What has to go
to let the next shards in is what the order needs last.

The processes of a machine share a folder and nothing else. Whoever holds its lock fetches and deletes; the others read
what lies there, and take over when the holder ends, however it ends. A file has its name once it's complete, checked
and durable. Only files of the names that are given here are ever deleted, in a folder that is the set's own.
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
"""Bytes of the disk that are left to others: checkpoints and logs may lie there too."""
_CONNECTIONS = 16  # parts under way: one process of a machine fetches
_PATIENCE = 10.0  # seconds between tries, where a shard cannot be had or another process fetches
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Figures:
    """What reading a remote set has cost this process so far."""

    from_cache: int = 0
    """Images read from the disk."""
    by_range: int = 0
    """Images read over the network."""
    fetched: int = 0
    """Bytes asked of the network."""
    waited: float = 0.0
    """Seconds that the threads waited for the network, added up."""

    def __sub__(self, other: "Figures") -> "Figures":
        return Figures(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass
class Job:
    """An object to fetch whole into a file, and the sum that it must have, where one is known."""

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
        """Takes the next part. True when the file is complete, False while more is to come. Raises OSError, BadSum."""
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
        """Gives a complete file its name, once its bytes are on the disk. Raises OSError."""
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        self.part.replace(self.path)  # a name that a lost machine forgets costs one more fetch

    def drop(self) -> None:
        """Gives up what is not complete."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            with suppress(OSError):
                self.part.unlink()


class BadSum(Exception):
    """A shard arrived in full, but not as its manifest says."""

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
    """Fetches objects into files, several parts at a time, and yields each job whose file is complete, in order.

    A job is taken from the iterator when there is a connection for it; the network does not wait for the disk's fsync.
    Raises what `Object.read`, `Job.write` and `Job.finish` raise; unfinished files are gone then, as they are where it
    is `stopped`.
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
                except RuntimeError:  # this process is at its end
                    return
    finally:
        for _, future in under_way:
            future.cancel()
        disk.shutdown()
        for job in begun:
            job.drop()


class Cache:
    """The folder of one set on this machine's disk, of at most `size` bytes, and the thread that fills it.

    `expect` says what is needed next. `failure` is what the thread ended with: bytes that are not what the manifest
    says, a shard that is gone or denied. Without a `root`, or with a `size` of 0, nothing is kept.
    """

    def __init__(self, root: Path | None, objects: Sequence[remote.Object], sums: Sequence[str | None], size: int):
        self.failure: ReadError | None = None
        self.figures = Figures()
        self.closed = False
        """Whether nothing more is fetched. What lies here is read still."""
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
        self._retried: set[int] = set()  # shards that arrived with a wrong sum once
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
        """A descriptor of a shard that lies here complete, or None."""
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
        """The shards in the order of their next use: the first `ahead` are fetched, for which later ones may go."""
        if self.folder is None or self.closed:
            return
        with self._condition:
            self._order, self._ahead, self._changed = list(order), ahead, True
            self._condition.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shards", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread, which gives the folder to others."""
        self._stopped.set()
        with self._condition:
            self._condition.notify()

    def owned(self) -> bool:
        """Whether this process fetches and deletes here: it becomes the one where nobody else is. Raises OSError."""
        if self.folder and not self._owner:
            with suppress(BlockingIOError):
                self._lock.enter_context(host.lock(self.folder / "lock"))
                self._owner = True
                for part in self._held(".tar.part").values():  # a killed process left it
                    part.unlink(missing_ok=True)
        return self._owner

    def release(self) -> None:
        """Gives the folder to others."""
        self._owner = False
        self._lock.close()

    def make_space(self, shard: int) -> bool:
        """Whether there is space for a shard, for which those that are needed later may go. Raises OSError."""
        if self.closed or not self.folder:
            return False
        wanted = self._objects[shard].size
        unfinished = self._held(".tar.part").keys() - {shard}  # first: they may get their names
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
            self._close(f"{self.folder} has no space for one of {wanted / 1e9:.2f} GB")
        return excess <= 0

    def job(self, shard: int, aside: Path | None = None) -> Job:
        """What fetches a shard, into this folder or one aside."""
        path = aside / f"{shard:06d}.tar" if aside else self.path(shard)
        return Job(shard, self._objects[shard], path, self._sums[shard])

    def path(self, shard: int) -> Path:
        assert self.folder
        return self.folder / f"{shard:06d}.tar"

    def _held(self, ending: str) -> dict[int, Path]:
        """The files of this ending here that this class made, by their shards."""
        assert self.folder
        mine = {f"{shard:06d}{ending}": shard for shard in range(len(self._objects))}
        return {mine[path.name]: path for path in self.folder.iterdir() if path.name in mine}

    def _is_complete(self, shard: int) -> bool:
        try:
            return self.path(shard).stat().st_size == self._objects[shard].size
        except OSError:
            return False

    def _close(self, why: str) -> None:
        _log.warning("shards are not kept on disk from here on, their images are read one by one: %s", why)
        self.closed = True

    def _run(self) -> None:
        while not self._stopped.is_set() and not self.closed:
            with self._condition:
                self._changed = False
            pause = None
            try:
                if self.owned():
                    for job in fetch(self._missing(), self.count, self._stopped):
                        _log.debug("%s lies in %s", job.wanted, job.path)
                else:
                    pause = _PATIENCE
            except ReadError as error:  # whoever needs the shard now meets the same, and says it
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
        """What is missing of the shards needed next, whatever is needed next at the time."""
        begun: set[int] = set()
        while True:
            with self._condition:
                soon = self._order[: self._ahead]
            shard = next((s for s in soon if s not in begun and not self._is_complete(s)), None)
            if shard is None or not self.make_space(shard):
                return
            begun.add(shard)
            yield self.job(shard)
