"""An OUT folder and one split in it: where each file lies, who may write it, what is made and what is missing.

Nothing becomes visible under its name before it is complete and durable: each file is written in a hidden work folder
and renamed. A shard counts as made when its record exists, which comes last; until then it is simply made again, with
the same bytes. So a kill, a full disk or a lost machine costs the shards then in work and nothing else.
"""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from pipeline import host
from pipeline.shards import SAMPLE

from . import SourceError
from .writer import OnProgress, Quarantined, Sample, ShardWriter, npy_bytes

TOOL_VERSION = "1.0"


class Busy(RuntimeError):
    """Another process works on the same target."""


@dataclass(frozen=True)
class Spec:
    """What makes a split the split it is: the same spec gives the same bytes."""

    name: str
    split: str
    shards: int
    seed: int
    options: dict[str, Any]  # JSON: what else the bytes depend on
    source: dict[str, Any]  # JSON: a fingerprint that tells whether two sources hold the same samples
    classes: list[str]
    class_file: str = "synsets.txt"  # one class a line, its number from 0 is the label
    members: tuple[str, ...] = ("jpg", "cls", "json")  # of every sample

    def shard_file(self, shard: int) -> str:
        return f"{self.name}-{self.split}-{shard:0{max(4, len(str(self.shards - 1)))}d}.tar"


class Target:
    """Where one split is written. Travels to other processes."""

    def __init__(self, out: Path, spec: Spec):
        self.out, self.spec = out, spec
        self.work = out / f".{spec.name}-{spec.split}.work"

    def part(self, part: tuple[int, int]) -> range:
        """The shards that part (number, of how many) makes."""
        return range(part[0], self.spec.shards, part[1])

    # --- paths

    def named(self, name: str) -> Path:
        """`name` for the folder's first split, `<split>.name` for every further one: the manifest, the quarantine."""
        return named(self.out, self.spec.split, name)

    def _record_path(self, shard: int) -> Path:
        return self.work / f"record.{shard}.json"

    # --- locks

    @contextmanager
    def lock(self, part: tuple[int, int]) -> Iterator[None]:
        """This part of this split for us alone: the parts of one run share the split, anything else raises Busy.

        Makes the work folder, and so shows at once whether OUT can be written: SourceError where it cannot. The kernel
        drops the lock when the process dies, however it dies.
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
                    raise Busy(f"another sharder works on {self.out}: wait for it, or choose another OUT") from None
            try:
                yield
            finally:
                if part[1] == 1 and not self._spec_path.exists():
                    shutil.rmtree(self.work, ignore_errors=True)  # refused, or complete: leave no trace

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """All who write to OUT, parts and splits alike, take turns: at the plan, and at the metadata."""
        path, ours = self.out / ".lock", False
        while not ours:
            with path.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):  # its last holder removed it
                    ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
                if ours:
                    try:
                        yield
                    finally:
                        path.unlink()

    # --- what is there

    def begin(self) -> bool:
        """Takes possession of OUT; True where this split is complete already, as far as its manifest knows.

        Raises SourceError where OUT holds another set, finished or begun, so that two never mix.
        """
        if self.manifest() is not None:
            return True
        classes = self.out / self.spec.class_file
        if self.spec.classes and classes.exists() and classes.read_bytes() != self._class_lines():
            raise SourceError(
                f"{classes} lists other classes than this source: say --classes {classes}, or choose another OUT"
            )
        begun = host.read_json(self._spec_path)
        if begun is not None and (difference := self._difference(begun)):
            raise SourceError(
                f"{self.out} holds an unfinished run with {difference}; "
                f"repeat that command, or delete {self.work} and its shards"
            )
        if begun is None:
            _write_json(self._spec_path, self._identity())
        return False

    def manifest(self) -> dict | None:
        """The manifest, where the split is finished. Raises SourceError where it is damaged or another set's."""
        path = self.named("manifest.json")
        if not path.exists():
            return None
        manifest = host.read_json(path)
        if manifest is None or manifest.get("split") != self.spec.split or not isinstance(manifest.get("shards"), list):
            raise SourceError(f"{path} is damaged: delete it and run the same command again")
        if difference := self._difference(manifest):
            raise SourceError(f"{path} is of another set: {difference}; choose another OUT, or delete that set")
        return manifest

    def missing(self, part: tuple[int, int] = (0, 1)) -> list[int]:
        """The shards of this part that are still to be made, or that were lost or damaged since."""
        manifest = self.manifest()
        listed = {entry["file"]: entry for entry in manifest["shards"]} if manifest else None
        return [shard for shard in self.part(part) if not self._is_made(shard, listed)]

    def _is_made(self, shard: int, listed: dict[str, dict] | None) -> bool:
        if listed is not None:
            entry = listed.get(self.spec.shard_file(shard))
            return entry is None or self._is_whole(entry)  # a shard without a single sample is in no manifest
        record = self._record(shard)
        return record is not None and (not record["entry"]["samples"] or self._is_whole(record["entry"]))

    def _is_whole(self, entry: dict) -> bool:
        """The files of a shard are there, and as long as they must be; `--check` reads them."""
        shard, samples = self.out / entry["file"], entry["samples"]
        try:
            table = np.load(shard.with_suffix(".samples.npy"), mmap_mode="r", allow_pickle=False)
            lines = shard.with_suffix(".idx").read_bytes().count(b"\n")
            found = (shard.stat().st_size, table.dtype, table.shape, lines)
        except (OSError, ValueError, EOFError):
            return False
        return found == (entry["bytes"], SAMPLE, (samples,), samples + 1)

    def _record(self, shard: int) -> dict | None:
        """What is known of a made shard; None where it is not made, or the record is damaged."""
        record = host.read_json(self._record_path(shard)) or {}
        entry = record.get("entry")
        return record if isinstance(entry, dict) and entry.get("file") == self.spec.shard_file(shard) else None

    @property
    def _spec_path(self) -> Path:
        return self.work / "spec.json"

    def _identity(self) -> dict[str, Any]:
        return {field: getattr(self.spec, field) for field in ("name", "seed", "options", "source")}

    def _difference(self, before: dict) -> str:
        """How the description of a finished or begun set differs from ours, in words; empty where it does not."""
        for field, now in self._identity().items():
            was = before.get(field)
            if isinstance(now, dict):
                was = was if isinstance(was, dict) else {}
                names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
                if names:
                    return f"{field}.{names[0]} = {was.get(names[0])!r} there, {now.get(names[0])!r} here"
            elif was != now:
                return f"{field} = {was!r} there, {now!r} here"
        return ""

    # --- one shard

    def make(self, shard: int, samples: Iterable[Sample | Quarantined], on_progress: OnProgress) -> None:
        """Writes shard number `shard` and its record."""
        name, writer = self.spec.shard_file(shard), ShardWriter()
        tar = self.work / name
        for left in self.work.glob(f"{tar.stem}.*"):  # by a run that was killed
            left.unlink()
        host.write_atomic(tar, lambda file: writer.write(file, samples, on_progress))
        table = writer.table
        entry = {"file": name, "bytes": writer.bytes, "sha256": writer.sha256, "samples": len(table)}
        entry |= {"repaired": writer.repaired, "quarantined": len(writer.quarantined)}
        self._refuse_other_bytes(entry)
        if len(table):
            index, beside = tar.with_suffix(".idx"), tar.with_suffix(".samples.npy")
            host.write_atomic(index, lambda file: file.write(writer.index))
            host.write_atomic(beside, lambda file: np.save(file, table))
            for path in (index, beside, tar):
                path.replace(self.out / path.name)
            host.sync_folder(self.out)
        record = {"entry": entry, "counts": writer.counts, "sums": writer.sums}
        record["quarantine"] = [
            {"key": one.key, "reason": one.reason, "source": one.source, "shard": name} for one in writer.quarantined
        ]
        _write_json(self._record_path(shard), record)

    def _refuse_other_bytes(self, entry: dict) -> None:
        """A lost shard of a finished set is made again only as it was."""
        manifest = self.manifest()
        listed = {one["file"]: one["sha256"] for one in manifest["shards"]} if manifest else {}
        if manifest and listed.get(entry["file"], entry["sha256"]) != entry["sha256"]:
            raise RuntimeError(
                f"{entry['file']} came out different from the manifest: another Pillow than {manifest['codec']}?"
            )

    # --- the split

    def finish(
        self,
        refused: Iterable[tuple[str, str]] = (),
        strict: bool = False,
        more: Callable[[dict[str, int]], dict[str, Any]] = lambda sums: {},
    ) -> dict | None:
        """Writes the split's metadata and, last, its manifest, which is returned; None while shards are missing.

        `refused`: (source, reason) of what the listing left out. `strict`: where anything is quarantined no manifest is
        written and RuntimeError raised. `more` turns the samples' sums into further fields of the manifest.
        """
        finished = manifest = self.manifest()
        if self.missing():
            return None
        if manifest is None:
            manifest = self._merge(refused, strict, more)
        if strict and manifest["quarantined"]:
            were = "were " if finished else ""
            raise RuntimeError(
                f"--strict: {manifest['quarantined']} image(s) {were}quarantined ({self.named('quarantine.jsonl')})"
            )
        shutil.rmtree(self.work, ignore_errors=True)
        return manifest

    def _merge(self, refused: Iterable[tuple[str, str]], strict: bool, more: Callable[[dict], dict]) -> dict:
        spec = self.spec
        records = [record for shard in range(spec.shards) if (record := self._record(shard))]
        entries = [record["entry"] for record in records if record["entry"]["samples"]]
        lines = [{"key": None, "reason": why, "source": source, "shard": None} for source, why in refused]
        lines += [line for record in records for line in record["quarantine"]]
        self._write(self.named("quarantine.jsonl"), "".join(json.dumps(line) + "\n" for line in lines).encode())
        counts, sums = (sum((Counter(record[what]) for record in records), Counter()) for what in ("counts", "sums"))
        manifest = {
            "format": 1,
            "name": spec.name,
            "split": spec.split,
            "tool_version": TOOL_VERSION,
            "codec": f"Pillow {Image.__version__}, libjpeg-turbo {features.version_feature('libjpeg_turbo')}",
            "seed": spec.seed,
            "options": spec.options,
            "source": spec.source,
            "num_samples": sum(entry["samples"] for entry in entries),
            "num_classes": len(spec.classes),
            "class_file": spec.class_file,
            "members": list(spec.members),
            "repaired": sum(entry["repaired"] for entry in entries),
            "quarantined": len(lines),
            "counts": dict(sorted(counts.items())),
            **more(sums),
            "shards": entries,
        }
        if not entries:
            raise SourceError(f"no image can be used: {self.named('quarantine.jsonl')} says why")
        if strict and lines:
            return manifest
        tables = [np.load(self.out / entry["file"].replace(".tar", ".samples.npy")) for entry in entries]
        for position, table in enumerate(tables):
            table["shard"] = position
        self._write(self.out / f"{spec.name}-{spec.split}.samples.npy", npy_bytes(np.concatenate(tables)))
        if spec.classes:
            self._write(self.out / spec.class_file, self._class_lines())
        self._write(self.out / "_info.json", json.dumps(self._info(entries), indent=1).encode())
        self._write(self.named("manifest.json"), json.dumps(manifest, indent=1).encode())
        return manifest

    def _write(self, path: Path, content: bytes) -> None:
        host.write_atomic(self.work / path.name, lambda file: file.write(content))
        (self.work / path.name).replace(path)
        host.sync_folder(path.parent)

    def _class_lines(self) -> bytes:
        return "".join(f"{name}\n" for name in self.spec.classes).encode("utf-8", "surrogateescape")

    def _info(self, entries: list[dict]) -> dict:
        """timm's `_info.json`, with the other splits of the folder kept."""
        before = host.read_json(self.out / "_info.json") or {}
        split = {
            "name": self.spec.split,
            "filenames": [entry["file"] for entry in entries],
            "shard_lengths": [entry["samples"] for entry in entries],
            "num_samples": sum(entry["samples"] for entry in entries),
        }
        return {
            "name": self.spec.name,
            "splits": dict(sorted({**before.get("splits", {}), split["name"]: split}.items())),
        }


def named(out: Path, split: str, name: str) -> Path:
    """`name` for the folder's first split, `<split>.name` for every further one."""
    first = out / "manifest.json"
    if first.exists() and (host.read_json(first) or {}).get("split", split) != split:
        return out / f"{split}.{name}"
    return out / name


def _write_json(path: Path, content: dict) -> None:
    host.write_atomic(path, lambda file: file.write(json.dumps(content).encode()))
