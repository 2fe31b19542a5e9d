"""One shard of a plan as samples: each image is read from the source, examined, and described in JSON."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import tar
from pipeline.remote import Folder, Object
from pipeline.shards import ReadError

from . import images, places, printable
from .places import Address
from .plan import Item, Plan, items, load
from .target import Target
from .writer import Quarantined, Sample

_AHEAD = 32  # images requested ahead from a network
_RETRIES = (0.2, 1.0)  # seconds between the three attempts, for network disks with hiccups


def persistent(read: Callable[..., bytes], path: object, *where: int) -> bytes:
    """Return `read(path, *where)`, with retries. Raises RuntimeError: an unreadable image need not be damaged."""
    for pause in (*_RETRIES, None):
        try:
            return read(path, *where)
        except OSError as error:
            if pause is None or isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
                raise RuntimeError(
                    f"{path} was listed and cannot be read ({error.strerror or error}): is the source still mounted? "
                    f"Run the same command again to resume"
                ) from None
            time.sleep(pause)
    raise AssertionError


class ShardMaker:
    """Makes shards of a plan. Pickled to workers, which memory-map the columns saved in the work folder."""

    def __init__(self, target: Target, plan: Plan, rules: images.Rules):
        self._target, self._rules, self._bounds = target, rules, plan.bounds
        self._root, self._tars, self._gzipped = plan.root, plan.tars, plan.gzipped

    def __call__(self, shard: int) -> dict[str, Any]:
        with closing(Reader()) as reader:
            entry = self._target.make(shard, self._samples(shard, reader))
        unpacked_path(self._target, shard).unlink(missing_ok=True)
        return entry

    def _samples(self, shard: int, reader: "Reader") -> Iterator[Sample | Quarantined]:
        rows, names = load(self._target.work)
        rows = rows[self._bounds[shard] : self._bounds[shard + 1]]
        key_style = self._target.spec.options["key"]
        if isinstance(self._root, Address) and not self._gzipped:
            contents = self._over_network(items(rows, names, key_style))
        else:
            contents = self._from_disk(items(rows, names, key_style), unpacked_path(self._target, shard), reader)
        for item, data in zip(items(rows, names, key_style), contents, strict=True):
            source = f"{self._tars[item.tar]}:{item.name}" if item.tar >= 0 else item.name
            try:
                jpeg = images.examine(data, self._rules)
            except images.Refused as refusal:
                yield Quarantined(item.key, str(refusal), printable(source))
                continue
            members = (("jpg", jpeg.content), ("cls", str(item.label).encode()), ("json", self._json(item, jpeg)))
            yield Sample(item.key, members, jpeg.height, jpeg.width, item.label, jpeg.repairs, jpeg.notes)

    def _from_disk(self, wanted: Iterator[Item], unpacked: Path, reader: "Reader") -> Iterator[bytes]:
        at = 0
        for item in wanted:
            if self._gzipped:
                yield persistent(reader.read, unpacked, at, item.size)
                at += item.size
            elif item.tar >= 0:
                yield persistent(reader.read, self._tars[item.tar], item.offset, item.size)
            else:
                yield persistent(Path.read_bytes, Path(str(self._root), item.name))

    def _over_network(self, wanted: Iterator[Item]) -> Iterator[bytes]:
        folder = Folder(str(self._root))

        def byte_range(item: Item) -> tuple[Object, int, int]:
            found = self._tars[item.tar] if item.tar >= 0 else Object(folder, item.name, item.size, None)
            assert isinstance(found, Object)
            return found, item.offset, item.offset + item.size  # the offset is 0 without a tar

        try:
            yield from places.read_all(map(byte_range, wanted), _AHEAD)
        except ReadError as error:
            raise RuntimeError(f"{error}; run the same command again to resume") from None

    def _json(self, item: Item, jpeg: images.Jpeg) -> bytes:
        metadata = {
            "filename": printable(item.name.rpartition("/")[2]),
            "label": item.label,
            "synset": self._target.spec.classes[item.label] if item.label >= 0 else None,
            "height": jpeg.height,
            "width": jpeg.width,
        }
        if jpeg.repairs:
            metadata["repaired"] = list(jpeg.repairs)
        return json.dumps(metadata).encode()


class Reader:
    """Reads bytes of tars by offset. Keeps up to 64 tars open."""

    def __init__(self) -> None:
        self._open: dict[Path, tar.PlainFile] = {}

    def read(self, path: Path, offset: int, size: int) -> bytes:
        if path not in self._open:
            while len(self._open) >= 64:
                self._open.pop(next(iter(self._open))).close()
            self._open[path] = tar.PlainFile(path)
        data = self._open[path].read_at(offset, size)
        if len(data) < size:
            raise OSError(f"{path} ends {size - len(data)} bytes early")
        return data

    def close(self) -> None:
        for file in self._open.values():
            file.close()


# --- a gzipped source ------------------------------------------------------------------------------------------------


def unpacked_path(target: Target, shard: int) -> Path:
    return target.work / f"unpacked.{shard}"


def unpack(target: Target, plan: Plan, shards: list[int], on_progress: Callable[[int, int], object]) -> None:
    """Sort a .tar.gz, which cannot be read at an offset, into one file per shard, in one pass with constant memory.

    Each file is deleted when its shard is made, so the disk never holds the set twice. An interrupted sort starts
    again, because gzip cannot resume in the middle. Raises TarError if the source was damaged since it was listed.
    """
    rows = {shard: np.arange(plan.bounds[shard], plan.bounds[shard + 1]) for shard in shards}
    rows = {shard: part for shard, part in rows.items() if not _is_unpacked(unpacked_path(target, shard), plan, part)}
    if not rows:
        return
    sizes = [plan.rows["size"][part] for part in rows.values()]
    row = np.concatenate(list(rows.values()))
    start = np.concatenate([np.cumsum(size) - size for size in sizes])
    owner = np.repeat(list(rows), [len(part) for part in rows.values()])
    with closing(places.open_bytes(plan.tars[0])) as source:
        for position in np.argsort(plan.rows["offset"][row]):
            at, size = int(plan.rows["offset"][row[position]]), int(plan.rows["size"][row[position]])
            file = os.open(target.work / f"part.unpacked.{owner[position]}", os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(file, source.read_at(at, size), int(start[position]))
            finally:
                os.close(file)
            on_progress(1, size)
    for shard in rows:
        (target.work / f"part.unpacked.{shard}").replace(unpacked_path(target, shard))


def _is_unpacked(path: Path, plan: Plan, rows: np.ndarray) -> bool:
    return path.exists() and path.stat().st_size == plan.rows["size"][rows].sum()
