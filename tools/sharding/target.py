"""An OUT folder and one split in it: paths, locks, finished and missing shards, metadata.

A file becomes visible under its name only when it is complete and durable: it is written in a hidden work folder and
renamed. A shard's record is written last, and the shard counts as made when the record exists. Until then it is made
again, with the same bytes. So a kill, a full disk or a lost machine costs only the shards in progress.
"""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, features

from pipeline import host
from pipeline.shards import SAMPLE

from . import SourceError
from .writer import Quarantined, Sample, ShardWriter

TOOL_VERSION = "1.0"
_FIELDS = {"name": str, "split": str, "codec": str, "seed": int, "options": dict, "source": dict, "num_samples": int}
_FIELDS |= {"num_classes": int, "quarantined": int, "counts": dict, "shards": list}
_SHARD_FIELDS = {"file": str, "bytes": int, "samples": int, "sha256": str}
_RECORD_FIELDS = {"entry": dict, "quarantine": list, "counts": dict, "sums": dict}


@dataclass(frozen=True)
class Spec:
    """The identity of a split: the same spec gives the same bytes."""

    name: str
    split: str
    shards: int
    seed: int
    options: dict[str, Any]  # JSON: other settings that the bytes depend on
    source: dict[str, Any]  # JSON: a fingerprint; equal if two sources have the same samples
    classes: list[str]
    class_file: str = "synsets.txt"  # one class per line; the line number from 0 is the label
    members: tuple[str, ...] = ("jpg", "cls", "json")  # of every sample

    def shard_file(self, shard: int) -> str:
        return f"{self.name}-{self.split}-{shard:0{max(4, len(str(self.shards - 1)))}d}.tar"


class Target:
    """The place where one split is written; pickled to workers."""

    def __init__(self, out: Path, spec: Spec):
        self.out, self.spec = out, spec
        self.work = out / f".{spec.name}-{spec.split}.work"

    def __str__(self) -> str:
        return str(self.out)

    def part(self, part: tuple[int, int]) -> range:
        """The shards of part (number, count)."""
        return range(part[0], self.spec.shards, part[1])

    # --- locks

    @contextmanager
    def lock(self, part: tuple[int, int]) -> Iterator[None]:
        """Lock this part of this split. Raises RuntimeError if it conflicts with another sharder's lock.

        Different parts of one run can be locked at the same time. Creates the work folder, so that an OUT that is not
        writable raises SourceError at once. The kernel releases the lock when the process dies for any reason.
        """
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SourceError(f"cannot write to {self.out}: {error.strerror}; choose another OUT") from None
        wanted = [("lock", fcntl.LOCK_SH if part[1] > 1 else fcntl.LOCK_EX)]
        wanted += [(f"lock.{part[0]}", fcntl.LOCK_EX)] if part[1] > 1 else []
        with ExitStack() as files:
            for name, how in wanted:
                file = files.enter_context((self.work / name).open("w"))
                try:
                    fcntl.flock(file, how | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RuntimeError(f"another sharder works on {self.out}: wait, or choose another OUT") from None
            try:
                yield
            finally:
                if part[1] == 1 and not self._spec_path.exists():
                    shutil.rmtree(self.work, ignore_errors=True)  # refused, or complete: leave no trace

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lock all of OUT against other parts and splits, to claim it or to write metadata."""
        path, ours = self.out / ".lock", False
        while not ours:
            with path.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):  # the previous holder removed the file
                    ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
                if ours:
                    try:
                        yield
                    finally:
                        path.unlink()

    # --- what is there

    def begin(self) -> bool:
        """Claim OUT for this set. Return True if the manifest says that this split is complete already.

        Raises SourceError if OUT holds another set, finished or begun, so that two sets never mix.
        """
        if self.manifest() is not None:
            return True
        classes = self.out / self.spec.class_file
        if self.spec.classes and classes.exists() and classes.read_bytes() != self._class_lines():
            raise SourceError(
                f"{classes} lists other classes than this source: say --classes {classes}, or choose another OUT"
            )
        begun = host.read_json(self._spec_path) or {}
        if not _has(begun, {"name": str, "seed": int, "options": dict, "source": dict}):
            _write_json(self._spec_path, asdict(self.spec))
        elif difference := self._difference(begun):
            raise SourceError(
                f"{self.out} holds an unfinished run with {difference}; "
                f"repeat that command, or delete {self.work} and its shards"
            )
        return False

    def manifest(self) -> dict | None:
        """The manifest if the split is finished, else None. Raises SourceError if it is damaged or another set's."""
        path = self._named("manifest.json")
        if not path.exists():
            return None
        manifest = host.read_json(path) or {}
        if fault(manifest):
            raise SourceError(f"{path} is damaged: delete it and run the same command again")
        if difference := self._difference(manifest):
            raise SourceError(f"{path} is of another set: {difference}; choose another OUT, or delete that set")
        return manifest

    def _difference(self, before: dict) -> str:
        """Describe the first difference between a finished or begun set and this one; empty if there is none."""
        theirs, ours = _identity(before), _identity(asdict(self.spec))
        names = (name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name))
        return next((f"{name} = {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in names), "")

    def missing(self, part: tuple[int, int] = (0, 1)) -> list[int]:
        """The shards of this part that are not made yet, or that were lost or damaged since."""
        manifest = self.manifest()
        listed = {entry["file"]: entry for entry in manifest["shards"]} if manifest else None
        return [shard for shard in self.part(part) if not self._is_made(shard, listed)]

    def others(self, part: tuple[int, int]) -> list[int]:
        """Shards of other parts that this finished part may help to make. None in a folder: each part has its lock."""
        return []

    def _is_made(self, shard: int, listed: dict[str, dict] | None) -> bool:
        """Whether a shard is made, by the manifest's entries `listed`, or without a manifest by its record."""
        if listed is None:
            entry = (self._record(shard) or {}).get("entry")
        else:
            entry = listed.get(self.spec.shard_file(shard), {"samples": 0})  # a shard without samples is in no manifest
        return entry is not None and (not entry["samples"] or self._is_there(entry))

    def _is_there(self, entry: dict) -> bool:
        """Whether a shard's files exist with the sizes in its entry. Contents are only read by `--check`."""
        tar, samples = self.out / entry["file"], entry["samples"]
        try:
            table = np.load(tar.with_suffix(".samples.npy"), mmap_mode="r", allow_pickle=False)
            lines = tar.with_suffix(".idx").read_bytes().count(b"\n")
            found = (tar.stat().st_size, table.dtype, table.shape, lines)
        except (OSError, ValueError, EOFError):
            return False
        return found == (entry["bytes"], SAMPLE, (samples,), samples + 1)

    def _record(self, shard: int) -> dict | None:
        """The record of a made shard, or None if it is not made or the record is damaged."""
        record = host.read_json(self._record_path(shard)) or {}
        valid = _has(record, _RECORD_FIELDS) and _has(record["entry"], _SHARD_FIELDS)
        return record if valid and record["entry"]["file"] == self.spec.shard_file(shard) else None

    def _record_path(self, shard: int) -> Path:
        return self.work / f"record.{shard}.json"

    @property
    def _spec_path(self) -> Path:
        return self.work / "spec.json"

    @property
    def _table_path(self) -> Path:
        return self.out / f"{self.spec.name}-{self.spec.split}.samples.npy"

    def _named(self, name: str) -> Path:
        return named(self.out, self.spec.split, name)

    # --- one shard

    def make(self, shard: int, samples: Iterable[Sample | Quarantined]) -> dict[str, Any]:
        """Write shard number `shard` and its record. Return its entry in the manifest."""
        name, writer = self.spec.shard_file(shard), ShardWriter()
        tar = self.work / name
        for left in self.work.glob(f"{tar.stem}.*"):  # left by a killed run
            left.unlink()
        host.write_atomic(tar, lambda file: writer.write(file, samples))
        table = writer.table
        entry = {"file": name, "bytes": writer.bytes, "sha256": writer.sha256, "samples": len(table)}
        entry |= {"repaired": writer.repaired, "quarantined": len(writer.quarantined)}
        manifest = self.manifest() or {"shards": []}
        if any(listed["file"] == name and listed["sha256"] != entry["sha256"] for listed in manifest["shards"]):
            raise RuntimeError(f"{name} was remade with other bytes: is Pillow not the manifest's {manifest['codec']}?")
        if len(table):
            index, beside = tar.with_suffix(".idx"), tar.with_suffix(".samples.npy")
            host.write_atomic(index, writer.index)
            host.write_atomic(beside, lambda file: np.save(file, table))
            for path in (index, beside, tar):
                path.replace(self.out / path.name)
            host.sync_folder(self.out)
        quarantine = [line | {"shard": name} for line in writer.quarantined]
        record = {"entry": entry, "quarantine": quarantine, "counts": writer.counts, "sums": writer.sums}
        _write_json(self._record_path(shard), record)
        return entry

    # --- the split

    def finish(
        self,
        refused: Iterable[tuple[str, str]] = (),
        strict: bool = False,
        more: Callable[[dict[str, int]], dict[str, Any]] = lambda sums: {},
    ) -> dict | None:
        """Write the split's metadata and finally its manifest. Return the manifest, or None while shards are missing.

        `refused` has (source, reason) of entries that the listing left out. With `strict`, a quarantined image raises
        RuntimeError and no manifest is written. `more` turns the samples' sums into further fields of the manifest.
        """
        if self.missing():
            return None
        finished = manifest = self.manifest()
        quarantine = self._named("quarantine.jsonl")
        if manifest is None:
            records = [record for shard in self.part((0, 1)) if (record := self._record(shard))]
            lines = [{"key": None, "reason": why, "source": source, "shard": None} for source, why in refused]
            lines += [line for record in records for line in record["quarantine"]]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            self._write(quarantine, text.encode())
            manifest = self._describe(records, len(lines), more)
            if not manifest["shards"]:
                raise SourceError(f"no image can be used: {quarantine} says why")
        if strict and manifest["quarantined"]:
            were = "were " if finished else ""
            raise RuntimeError(f"--strict: {manifest['quarantined']} image(s) {were}quarantined ({quarantine})")
        if not finished or not self._has_metadata(manifest):
            self._write_metadata(manifest)
        self._remove_work()
        return manifest

    def _describe(self, records: list[dict], quarantined: int, more: Callable[[dict], dict]) -> dict[str, Any]:
        spec = self.spec
        entries = [record["entry"] for record in records if record["entry"]["samples"]]
        counts, sums = (sum((Counter(record[what]) for record in records), Counter()) for what in ("counts", "sums"))
        return {
            "format": 1,
            "name": spec.name,
            "split": spec.split,
            "tool_version": TOOL_VERSION,
            "codec": f"Pillow {Image.__version__}, libjpeg-turbo {features.version_feature('libjpeg_turbo')}, "
            f"zlib {features.version_feature('zlib_ng') or features.version_codec('zlib')}",
            "seed": spec.seed,
            "options": spec.options,
            "source": spec.source,
            "num_samples": sum(entry["samples"] for entry in entries),
            "num_classes": len(spec.classes),
            "class_file": spec.class_file,
            "members": list(spec.members),
            "repaired": sum(entry["repaired"] for entry in entries),
            "quarantined": quarantined,
            "counts": dict(sorted(counts.items())),
            **more(sums),
            "shards": entries,
        }

    def _has_metadata(self, manifest: dict[str, Any]) -> bool:
        """Whether the files beside a manifest are there, and the table is as long as it says; `--check` reads them."""
        classes = self.out / self.spec.class_file
        named = not self.spec.classes or (classes.exists() and classes.read_bytes() == self._class_lines())
        return named and self.spec.split in timm_splits(self.out) and self._has_table(manifest["num_samples"])

    def _has_table(self, samples: int) -> bool:
        try:
            table = np.load(self._table_path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        return (table.dtype, table.shape) == (SAMPLE, (samples,))

    def _write_metadata(self, manifest: dict[str, Any]) -> None:
        """Write the split's table, the class list, timm's `_info.json` (keeping other splits), last the manifest."""
        files, lengths = ([entry[field] for entry in manifest["shards"]] for field in ("file", "samples"))
        tables = [np.load((self.out / file).with_suffix(".samples.npy")) for file in files]
        for position, table in enumerate(tables):
            table["shard"] = position
        name, split = self.spec.name, self.spec.split
        self._write(self._table_path, lambda file: np.save(file, np.concatenate(tables)))
        if self.spec.classes:
            self._write(self.out / self.spec.class_file, self._class_lines())
        info = {"name": split, "filenames": files, "shard_lengths": lengths, "num_samples": manifest["num_samples"]}
        splits = {**timm_splits(self.out), split: info}
        info = {"name": name, "splits": dict(sorted(splits.items()))}
        self._write(self.out / "_info.json", json.dumps(info, indent=1).encode())
        self._write(self._named("manifest.json"), json.dumps(manifest, indent=1).encode())

    def _remove_work(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    def _write(self, path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
        host.write_atomic(self.work / path.name, content)
        (self.work / path.name).replace(path)
        host.sync_folder(path.parent)

    def _class_lines(self) -> bytes:
        return "".join(f"{name}\n" for name in self.spec.classes).encode("utf-8", "surrogateescape")


def named(out: Path, split: str, name: str) -> Path:
    """The path of a split's manifest or quarantine: `name` for the folder's first split, else `<split>.name`."""
    first = host.read_json(out / "manifest.json") or {}
    return out / (f"{split}.{name}" if first.get("split", split) != split else name)


def timm_splits(out: Path) -> dict[str, dict]:
    """The splits in timm's `_info.json` by name; empty if there are none."""
    splits = (host.read_json(out / "_info.json") or {}).get("splits")
    found = splits.items() if isinstance(splits, dict) else ()
    return {name: split for name, split in found if isinstance(split, dict)}


def fault(manifest: dict) -> str:
    """Describe why a manifest is invalid; empty if it is valid."""
    if manifest.get("format") != 1 or not _has(manifest, _FIELDS):
        return "no manifest of format 1"
    if not all(isinstance(entry, dict) and _has(entry, _SHARD_FIELDS) for entry in manifest["shards"]):
        return "an entry of its shards is invalid"
    for name in (manifest.get("class_file", "synsets.txt"), *(entry["file"] for entry in manifest["shards"])):
        if not isinstance(name, str) or Path(name).name != name:
            return f"{name!r} leads out of the folder"
    return ""


def _has(fields: dict, kinds: Mapping[str, type]) -> bool:
    return all(isinstance(fields.get(name), kind) for name, kind in kinds.items())


def _identity(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a spec or a manifest that distinguish one set from another."""
    nested = {f"{outer}.{name}": value for outer in ("options", "source") for name, value in fields[outer].items()}
    return {"name": fields["name"], "seed": fields["seed"], **nested}


def _write_json(path: Path, content: dict) -> None:
    host.write_atomic(path, json.dumps(content).encode())
