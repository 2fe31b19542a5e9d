"""One shard of a plan as samples: each image read from where it lies, examined, and described in JSON."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline import tar

from . import images, printable
from .plan import Item, Plan
from .target import Target
from .writer import OnProgress, Quarantined, Sample

T = TypeVar("T")
_RETRIES = (0.2, 1.0)  # seconds; a network disk that hiccups gets three tries


class Unreadable(images.Refused):
    """The bytes cannot be had, whatever they are."""


def persistent(read: Callable[[T], bytes], item: T) -> bytes:
    """`read(item)`, tried again where it fails. Raises Unreadable, and RuntimeError where the file has vanished."""
    for pause in (*_RETRIES, None):
        try:
            return read(item)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RuntimeError(f"{error.filename} was listed and is gone: is the source still mounted?") from None
        except OSError as error:
            if pause is None or isinstance(error, PermissionError):
                raise Unreadable(f"unreadable: {error.strerror or error}") from None
            time.sleep(pause)
    raise AssertionError


class ShardMaker:
    """Makes shards of a plan. Travels to worker processes, each of which maps the plan that the work folder holds.

    `root` and `tars` say where the source lies now: the saved plan may name the path of another machine.
    """

    def __init__(self, target: Target, plan: Plan, rules: images.Rules):
        self._target, self._rules = target, rules
        self._root, self._tars, self._gzipped = plan.root, plan.tars, plan.gzipped

    def __call__(self, shard: int, on_progress: OnProgress) -> None:
        bucket = bucket_path(self._target, shard)
        with closing(Bucket(bucket) if self._gzipped else Reader(self._root, self._tars)) as reader:
            self._target.make(shard, self._samples(shard, reader), on_progress)
        bucket.unlink(missing_ok=True)

    @cached_property
    def _plan(self) -> Plan:
        return Plan.load(self._target.work)

    def _samples(self, shard: int, reader: "Reader | Bucket") -> Iterator[Sample | Quarantined]:
        unreadable = 0
        for item in self._plan.items(shard):
            try:
                jpeg = images.examine(persistent(reader.read, item), self._rules)
            except images.Refused as refusal:
                unreadable += isinstance(refusal, Unreadable)
                if unreadable > max(10, self._plan.images([shard]) // 50):
                    raise RuntimeError(
                        f"{unreadable} files of one shard are unreadable, the last is {item.name!r} ({refusal}): that "
                        f"is a sick disk or missing rights, not bad images; repair it and run the same command again"
                    ) from None
                source = f"{self._tars[item.tar]}:{item.name}" if item.tar >= 0 else item.name
                yield Quarantined(item.key, str(refusal), printable(source), item.size)
                continue
            members = (("jpg", jpeg.content), ("cls", str(item.label).encode()), ("json", self._json(item, jpeg)))
            yield Sample(
                item.key, members, jpeg.height, jpeg.width, item.label, jpeg.repairs, jpeg.notes, read=item.size
            )

    def _json(self, item: Item, jpeg: images.Jpeg) -> bytes:
        metadata = {
            "filename": printable(item.name.rpartition("/")[2]),
            "label": item.label,
            "synset": self._plan.spec.classes[item.label] if item.label >= 0 else None,
            "height": jpeg.height,
            "width": jpeg.width,
        }
        if jpeg.repairs:
            metadata["repaired"] = list(jpeg.repairs)
        return json.dumps(metadata).encode()


class Reader:
    """Bytes of an item: from its file, or from its tar by offset. Keeps the tars used last open."""

    def __init__(self, root: str, tars: list[str]):
        self._root, self._tars = root, tars
        self._open: dict[int, tar.PlainFile] = {}

    def read(self, item: Item) -> bytes:
        if item.tar < 0:
            with open(f"{self._root}/{item.name}", "rb") as file:  # noqa: PTH123 - a path object costs more than this
                return file.read()
        if item.tar not in self._open:
            while len(self._open) >= 64:
                self._open.pop(next(iter(self._open))).close()
            self._open[item.tar] = tar.PlainFile(Path(self._tars[item.tar]))
        data = self._open[item.tar].read_at(item.offset, item.size)
        if len(data) < item.size:
            raise OSError(f"{self._tars[item.tar]} ends {item.size - len(data)} bytes early")
        return data

    def close(self) -> None:
        for file in self._open.values():
            file.close()


# --- a gzipped source ------------------------------------------------------------------------------------------------


def bucket_path(target: Target, shard: int) -> Path:
    return target.work / f"bucket.{shard}"


class Bucket:
    """The images of one shard of a .tar.gz, in the shard's order."""

    def __init__(self, path: Path):
        self._file = path.open("rb")

    def read(self, item: Item) -> bytes:
        data = self._file.read(item.size)
        if len(data) < item.size:
            raise RuntimeError(f"{self._file.name} is cut short: delete it and run the same command again")
        return data

    def close(self) -> None:
        self._file.close()


def fill_buckets(target: Target, plan: Plan, shards: list[int], on_progress: Callable[[int, int], object]) -> None:
    """Sorts a .tar.gz, which cannot be read at an offset, into one file per shard: one pass, constant memory.

    A bucket is deleted when its shard is made, so the disk holds the set once and never twice. Interrupted, the sorting
    begins again: gzip has no way to continue in the middle. Raises TarError where the source was damaged since.
    """
    wanted = [shard for shard in shards if not bucket_path(target, shard).exists()]
    if not wanted:
        return
    rows = [np.arange(plan.bounds[shard], plan.bounds[shard + 1]) for shard in wanted]
    sizes = [plan.rows["size"][part] for part in rows]
    row = np.concatenate(rows)
    start = np.concatenate([np.cumsum(size) - size for size in sizes])
    owner = np.repeat(wanted, [len(part) for part in rows])
    with closing(tar.GzipFile(Path(plan.tars[0]))) as source:
        for position in np.argsort(plan.rows["offset"][row]):
            at, size = int(plan.rows["offset"][row[position]]), int(plan.rows["size"][row[position]])
            file = os.open(target.work / f"part.bucket.{owner[position]}", os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(file, source.read_at(at, size), int(start[position]))
            finally:
                os.close(file)
            on_progress(1, size)
    for shard in wanted:
        (target.work / f"part.bucket.{shard}").replace(bucket_path(target, shard))
