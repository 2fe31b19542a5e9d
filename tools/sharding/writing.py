"""One shard onto the disk, and the record that it is whole.

Nothing becomes visible under its name before it is complete and synced: each file is written in the hidden work folder
and renamed. A shard counts as done when its record exists, which comes last; until then it is simply made again, with
the same bytes. So a kill, a full disk or a lost machine costs the shards then in work and nothing else.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from . import images, tars
from .plan import Item, Plan

_RETRIES = (0.2, 1.0)  # seconds; a network disk that hiccups gets three tries


# Is told of images, their bytes, how many were repaired and how many quarantined.
Told = Callable[[int, int, int, int], None]


class Busy(RuntimeError):
    """Another process works on the same target."""


def work_folder(out: Path, plan: Plan) -> Path:
    return out / f".{plan.name}-{plan.split}.work"


@contextmanager
def locked(work: Path, part: tuple[int, int]) -> Iterator[None]:
    """This part of this target for us alone: the parts of one run share the target, anything else is refused.

    The kernel drops the lock when the process dies, however it dies.
    """
    work.mkdir(parents=True, exist_ok=True)
    wanted = [("lock", fcntl.LOCK_SH if part[1] > 1 else fcntl.LOCK_EX)]
    wanted += [(f"lock.{part[0]}", fcntl.LOCK_EX)] if part[1] > 1 else []
    files = []
    try:
        for name, how in wanted:
            files.append((work / name).open("w"))
            try:
                fcntl.flock(files[-1], how | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"another sharder is at work on {work.parent}: wait for it, or choose another OUT") from None
        try:
            yield
        finally:
            if part[1] == 1 and not (work / "plan.json").exists():
                shutil.rmtree(work, ignore_errors=True)  # refused, or all done long ago: leave no trace
    finally:
        for file in files:
            file.close()


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Parts of one run take turns: at the plan, and at the metadata."""
    work.mkdir(exist_ok=True)  # the last part may have tidied it away
    with (work / "turn").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- one shard -------------------------------------------------------------------------------------------------------


class Reader:
    """Bytes of an item: from its file, or from its tar by offset. Keeps the tars used last open."""

    def __init__(self, plan: Plan):
        self._root, self._tars = plan.root, plan.tars
        self._open: dict[int, tars.Seekable] = {}

    def read(self, item: Item) -> bytes:
        if item.place < 0:
            with open(f"{self._root}/{item.name}", "rb") as file:  # noqa: PTH123 - a path object costs more than this
                return file.read()
        if item.place not in self._open:
            while len(self._open) >= 64:
                self._open.pop(next(iter(self._open))).close()
            self._open[item.place] = tars.Seekable(Path(self._tars[item.place]))
        data = self._open[item.place].read_at(item.offset, item.size)
        if len(data) < item.size:
            raise OSError(f"{self._tars[item.place]} ends {item.size - len(data)} bytes early")
        return data

    def close(self) -> None:
        for tar in self._open.values():
            tar.close()


class Unreadable(images.Refused):
    """The bytes cannot be had, whatever they are."""


def _read(read: Callable[[Item], bytes], item: Item) -> bytes:
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


def write_shard(
    plan: Plan,
    out: Path,
    shard: int,
    rules: images.Rules,
    told: Told = lambda *_: None,
) -> dict:
    """Makes shard number `shard` and its record"""
    work, name = work_folder(out, plan), plan.shard_file(shard)
    half = work / f"{name}.{os.getpid()}"
    reader: Reader | SpoolReader = SpoolReader(work, shard) if plan.gzipped else Reader(plan)
    quarantine: list[dict] = []
    notes: dict[str, int] = {}
    repaired = unreadable = 0
    for left in work.glob(f"{name}.*"):  # by a run that was killed
        left.unlink()
    try:
        with half.open("wb", buffering=1 << 20) as file:
            tar = tars.ShardWriter(file)
            for item in plan.items(shard):
                try:
                    sound = images.examine(_read(reader.read, item), rules)
                except images.Refused as refusal:
                    unreadable += isinstance(refusal, Unreadable)
                    if unreadable > max(10, (plan.bounds[shard + 1] - plan.bounds[shard]) // 50):
                        raise RuntimeError(
                            f"{unreadable} files of one shard are unreadable, the last is {item.name!r} ({refusal}): "
                            f"that is a sick disk or missing rights, not bad images; mend it and run the command again"
                        ) from None
                    where = f"{plan.tars[item.place]}:{item.name}" if item.place >= 0 else item.name
                    quarantine.append(
                        {"key": item.key, "reason": str(refusal), "source": printable(where), "shard": name}
                    )
                    told(1, item.size, 0, 1)
                    continue
                tar.add(item.key, sound.jpeg, item.label, _json(plan, item, sound), sound.height, sound.width)
                repaired += bool(sound.repairs)
                for note in (*sound.repairs, *sound.notes):
                    notes[note] = notes.get(note, 0) + 1
                told(1, item.size, bool(sound.repairs), 0)
            sha256 = tar.finish()
            _sync(file)
        entry = {"file": name, "bytes": tar.bytes, "sha256": sha256, "samples": len(tar.rows)}
        entry |= {"repaired": repaired, "quarantined": len(quarantine)}
        if tar.rows:
            stem = out / name.removesuffix(".tar")
            put(stem.with_suffix(".idx"), tars.index_text(tar.index).encode(), work)
            put(stem.with_suffix(".samples.npy"), tars.npy_bytes(tars.table(tar.rows)), work)
            half.replace(out / name)
            _sync_folder(out)
        record = {"entry": entry, "quarantine": quarantine, "notes": notes}
        put(record_path(work, shard), json.dumps(record).encode(), work)
        if plan.gzipped:
            SpoolReader.drop(work, shard)
        return record
    finally:
        half.unlink(missing_ok=True)
        reader.close()


def _json(plan: Plan, item: Item, sound: images.Sound) -> bytes:
    said = {
        "filename": printable(item.name.rpartition("/")[2]),
        "label": item.label,
        "synset": plan.classes[item.label] if item.label >= 0 else None,
        "height": sound.height,
        "width": sound.width,
    }
    if sound.repairs:
        said["repaired"] = list(sound.repairs)
    return json.dumps(said).encode()


def printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def record_path(work: Path, shard: int) -> Path:
    return work / f"record.{shard}.json"


def put(path: Path, data: bytes, work: Path) -> None:
    """A small file at once and for good: written beside, synced, renamed."""
    half = work / f"{path.name}.{os.getpid()}"
    try:
        with half.open("wb") as file:
            file.write(data)
            _sync(file)
        half.replace(path)
        _sync_folder(path.parent)
    finally:
        half.unlink(missing_ok=True)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- a gzipped source ------------------------------------------------------------------------------------------------


class SpoolReader:
    """Images of one shard, in its order, from the spool that `spool` wrote."""

    def __init__(self, work: Path, shard: int):
        self._file = self.path(work, shard).open("rb")

    @staticmethod
    def path(work: Path, shard: int) -> Path:
        return work / f"spool.{shard}"

    @classmethod
    def drop(cls, work: Path, shard: int) -> None:
        cls.path(work, shard).unlink(missing_ok=True)

    def read(self, item: Item) -> bytes:
        data = self._file.read(item.size)
        if len(data) < item.size:
            raise RuntimeError(f"{self._file.name} is cut short: delete it and run the same command again")
        return data

    def close(self) -> None:
        self._file.close()


def spool(plan: Plan, out: Path, shards: list[int], told: Told = lambda *_: None) -> None:
    """Sorts a .tar.gz, which cannot be read at an offset, into one file per shard: one pass, constant memory.

    Each image goes to its final place in its shard's spool; a shard's spool is deleted when the shard is made, so the
    disk holds the set once and never twice. Interrupted, it begins again: gzip has no way to go on in the middle.
    """
    work = work_folder(out, plan)
    wanted = [shard for shard in shards if not (SpoolReader.path(work, shard)).exists()]
    if not wanted:
        return
    rows = [np.arange(plan.bounds[shard], plan.bounds[shard + 1]) for shard in wanted]
    sizes = [plan.rows["size"][part] for part in rows]
    row = np.concatenate(rows)
    start = np.concatenate([np.cumsum(size) - size for size in sizes])
    owner = np.repeat(wanted, [len(part) for part in rows])
    source = tars.Gzipped(Path(plan.tars[0]))
    try:
        for position in np.argsort(plan.rows["offset"][row]):
            at, size = int(plan.rows["offset"][row[position]]), int(plan.rows["size"][row[position]])
            file = os.open(work / f"half.spool.{owner[position]}", os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(file, source.read_at(at, size), int(start[position]))
            finally:
                os.close(file)
            told(1, size, 0, 0)
    finally:
        source.close()
    for shard in wanted:
        (work / f"half.spool.{shard}").replace(SpoolReader.path(work, shard))
