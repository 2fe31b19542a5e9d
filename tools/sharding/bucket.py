"""A split that is written to a bucket.

Shards are made in a local folder of this process and uploaded, the shard's record last. As on a disk, a shard counts as
made when its record exists. A put is atomic, and a shard's bytes depend only on the source and the options, so no lock
is needed: two processes that make the same shard write the same bytes. Claiming the address must happen only once: it
is a put that fails if the object exists. A finished part helps with the shards of other parts, so that a lost machine
costs time, but no second start.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pipeline import remote
from pipeline.remote import Folder
from pipeline.specs import ShardError

from . import SourceError
from .places import Place
from .target import Spec, Target
from .writer import Quarantined, Sample

T = TypeVar("T")
_STATE = ("spec.json", "record.")  # shared files of the work folder; the others are local to this process


class BucketTarget(Target):
    """A target at an address. `out` is a local folder of this process with copies of the bucket's state."""

    def __init__(self, address: str, spec: Spec):
        super().__init__(Path(tempfile.gettempdir()) / f"sharding-{os.getpid()}-{spec.name}-{spec.split}", spec)
        self.address = address.rstrip("/")
        self._listed: dict[str, int] = {}  # object -> bytes

    def __str__(self) -> str:
        return self.address

    # --- locks

    @contextmanager
    def lock(self, part: tuple[int, int]) -> Iterator[None]:
        self.work.mkdir(parents=True)
        try:
            yield
        finally:
            shutil.rmtree(self.out, ignore_errors=True)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        yield

    # --- what is there

    def begin(self) -> bool:
        self._pull()
        finished = self._begin()
        if not finished and not _run(self._remote_work.put("spec.json", self._spec_path.read_bytes(), create=True)):
            self._spec_path.unlink()
            self._pull()
            self._begin()  # raises if the process that was first makes another set
        return finished

    def _begin(self) -> bool:
        try:
            return super().begin()
        except SourceError as error:  # the message names our local copy
            raise SourceError(str(error).replace(str(self.out), self.address)) from None

    def missing(self, part: tuple[int, int] = (0, 1)) -> list[int]:
        self._pull()
        return super().missing(part)

    def others(self, part: tuple[int, int]) -> list[int]:
        """The missing shards of other parts. The start depends on the part, so that helpers begin differently."""
        missing = self.missing() if part[1] > 1 else []
        start = part[0] * len(missing) // part[1]
        return missing[start:] + missing[:start]

    def _is_there(self, entry: dict) -> bool:
        name = Path(entry["file"])
        beside = (name.with_suffix(".idx").name, name.with_suffix(".samples.npy").name)
        return self._listed.get(name.name) == entry["bytes"] and all(other in self._listed for other in beside)

    @property
    def _remote(self) -> Folder:
        return Folder(self.address)

    @property
    def _remote_work(self) -> Folder:
        return Folder(f"{self.address}/{self.work.name}")

    def _pull(self) -> None:
        """Fetch the bucket's state of this split and of the folder (spec, records, metadata), but no shards."""
        here, work = _run(self._remote.list()), _run(self._remote_work.list())
        self._listed = {name: found.size for name, found in here.items()}
        metadata = {self.spec.class_file, "_info.json", "manifest.json", f"{self.spec.split}.manifest.json"}
        for path in [path for path in self.out.iterdir() if path.name in metadata - here.keys()]:
            path.unlink()
        wanted = {self.out / name: found for name, found in here.items() if name in metadata}
        records = {name: found for name, found in work.items() if name.startswith(_STATE)}
        wanted |= {self.work / name: found for name, found in records.items() if not (self.work / name).exists()}
        self._fetch(wanted)

    def _fetch(self, wanted: dict[Path, remote.Object]) -> None:
        arriving = {path: remote.submit(found.read(0, found.size)) for path, found in wanted.items()}
        for path, content in arriving.items():
            path.write_bytes(remote.wait(content))

    # --- one shard

    def make(self, shard: int, samples: Iterable[Sample | Quarantined]) -> dict[str, Any]:
        if entry := self._made_elsewhere(shard):
            return entry
        entry = super().make(shard, samples)
        tar = self.out / entry["file"]
        if entry["samples"]:
            for path in (tar.with_suffix(".idx"), tar.with_suffix(".samples.npy"), tar):
                _run(self._remote.put(path.name, path))
            tar.unlink()
        _run(self._remote_work.put(self._record_path(shard).name, self._record_path(shard)))
        return entry

    def _made_elsewhere(self, shard: int) -> dict | None:
        """The entry of a shard that another part has made since the last look at the bucket, or None."""
        name = self._record_path(shard).name
        found = _run(self._remote_work.head(name))
        if found is None or self._record_path(shard).exists():
            return None
        self._fetch({self._record_path(shard): found})
        entry: dict = (self._record(shard) or {}).get("entry") or {"file": name, "bytes": -1}
        tar = _run(self._remote.head(entry["file"]))
        return entry if tar and tar.size == entry["bytes"] else None

    # --- the split

    def _has_table(self, samples: int) -> bool:
        return self._table_path.name in self._listed

    def _write_metadata(self, manifest: dict[str, Any]) -> None:
        tables = [(self.out / entry["file"]).with_suffix(".samples.npy") for entry in manifest["shards"]]
        here = _run(self._remote.list())
        self._fetch({path: here[path.name] for path in tables if not path.exists()})  # of shards made elsewhere
        super()._write_metadata(manifest)

    def _remove_work(self) -> None:
        super()._remove_work()
        _run(self._remote_work.delete(_run(self._remote_work.list())))

    def _write(self, path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
        self.work.mkdir(exist_ok=True)
        super()._write(path, content)
        _run(self._remote.put(path.name, path))


def _run(task: Coroutine[Any, Any, T]) -> T:
    try:
        return remote.run(task)
    except ShardError as error:
        raise SourceError(str(error)) from None


def at(out: Place, spec: Spec) -> Target:
    """Return the target at a folder or an address. Raises SourceError for an address that cannot be written."""
    if isinstance(out, Path):
        return Target(out, spec)
    if out.url.lower().startswith("http"):
        raise SourceError(f"{out}: a web server takes no shards: name a bucket or a folder")
    return BucketTarget(out.url, spec)
