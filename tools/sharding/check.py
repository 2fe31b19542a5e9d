"""Is a finished folder what its manifests say? Reads every byte."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import host, tar
from pipeline.shards import SAMPLE

from . import SourceError, pool, writer
from .target import named

_WANTED = {"name": str, "split": str, "num_samples": int, "num_classes": int, "shards": list}
_WANTED_OF_A_SHARD = {"file": str, "bytes": int, "samples": int, "sha256": str}
_LARGEST = 1 << 28  # bytes of a member that is read whole


@dataclass(frozen=True)
class Found:
    """What a sample's members say. `sums` are added up over the split."""

    height: int
    width: int
    label: int
    differences: tuple[str, ...] = ()
    sums: Mapping[str, int] | None = None


# Looks into one sample: (key, read(extension) -> bytes, class names) -> Found. Must travel to other processes.
Look = Callable[[str, Callable[[str], bytes], list[str]], Found]
Compare = Callable[[dict, Counter], list[str]]  # (manifest, sums) -> differences of the whole split


def labelled_image(key: str, read: Callable[[str], bytes], classes: list[str]) -> Found:
    """An image with `cls` and `json`: labels in range, of one mind, and of the class that the JSON names."""
    differences = []
    metadata = _json(read("json"))
    try:
        label = int(read("cls")[:32])
    except ValueError:
        label = -2
    if not -1 <= label < len(classes) or (label < 0) != (not classes):
        differences.append(f"label {label} of {key} is out of range ({len(classes)} classes)")
        label = -1
    if label >= 0 and metadata.get("synset") != classes[label]:
        differences.append(f"{key} is of {metadata.get('synset')}, synsets.txt says {classes[label]}")
    if metadata.get("label") != label:
        differences.append(f"{key}.json and {key}.cls give different labels")
    return Found(metadata.get("height", 0), metadata.get("width", 0), label, tuple(differences))


def run(
    out: Path, workers: int, look: Look = labelled_image, compare: Compare = lambda manifest, sums: []
) -> list[str]:
    """Every difference found, a sentence each; none: the folder is what it was. SourceError without a manifest."""
    manifests = sorted(out.glob("manifest.json")) + sorted(out.glob("*.manifest.json"))
    if not manifests:
        unfinished = ": the run that writes it is unfinished" if any(out.glob(".*.work")) else ""
        raise SourceError(f"{out} holds no manifest.json{unfinished or ': it is no folder that this tool finished'}")
    differences: list[str] = []
    listed: set[str] = set()
    for path in manifests:
        manifest = host.read_json(path) or {}
        if fault := _fault(manifest):
            differences.append(f"{path.name}: {fault}")
            continue
        listed |= {entry["file"] for entry in manifest["shards"]}
        differences += _split(out, path, manifest, workers, look, compare)
    return differences + [f"{tar.name}: in no manifest" for tar in sorted(out.glob("*.tar")) if tar.name not in listed]


def _fault(manifest: dict) -> str:
    if manifest.get("format") != 1 or not _has(manifest, _WANTED):
        return "no manifest of format 1"
    if not all(isinstance(entry, dict) and _has(entry, _WANTED_OF_A_SHARD) for entry in manifest["shards"]):
        return "an entry of shards is none"
    if any(Path(entry["file"]).name != entry["file"] for entry in manifest["shards"]):
        return "a shard's name leads out of the folder"
    return ""


def _has(fields: dict, wanted: dict[str, type]) -> bool:
    return all(isinstance(fields.get(name), kind) for name, kind in wanted.items())


def _split(out: Path, path: Path, manifest: dict, workers: int, look: Look, compare: Compare) -> list[str]:
    shards = manifest["shards"]
    job = _Shard(out, manifest.get("class_file", "synsets.txt"), manifest.get("members", ["jpg", "cls", "json"]), look)
    differences: list[str] = []
    keys, tables, sums = [], [], Counter[str]()
    with (
        pool.progress(manifest["num_samples"], f"checking {manifest['split']}") as shown,
        ProcessPoolExecutor(max(1, min(workers, len(shards))), get_context("spawn")) as processes,
    ):
        for entry, (found, digests, table, more) in zip(shards, processes.map(job, shards), strict=True):
            differences += found
            keys.append(digests)
            tables.append(table)
            sums.update(more)
            shown.add(len(table), entry["bytes"], 0, 0)
    differences += _duplicates(keys, [entry["file"] for entry in shards])
    total = sum(len(table) for table in tables)
    if total != manifest["num_samples"]:
        differences.append(f"{path.name}: says {manifest['num_samples']} samples, the tars hold {total}")
    for position, table in enumerate(tables):
        table["shard"] = position
    merged = out / f"{manifest['name']}-{manifest['split']}.samples.npy"
    differences += _table(merged, np.concatenate(tables)) if tables else []
    return differences + _metadata(out, manifest) + compare(manifest, sums)


def _metadata(out: Path, manifest: dict) -> list[str]:
    differences = []
    info = host.read_json(out / "_info.json") or {}
    split = info.get("splits", {}).get(manifest["split"], {})
    shards = manifest["shards"]
    wanted = [[one["file"] for one in shards], [one["samples"] for one in shards], manifest["num_samples"]]
    if [split.get(field) for field in ("filenames", "shard_lengths", "num_samples")] != wanted:
        differences.append(f"_info.json: says something else about split {manifest['split']!r}")
    classes = out / manifest.get("class_file", "synsets.txt")
    if manifest["num_classes"] and (count := len(_classes(classes))) != manifest["num_classes"]:
        differences.append(f"{classes.name}: {count} classes, the manifest says {manifest['num_classes']}")
    quarantine = named(out, manifest["split"], "quarantine.jsonl")
    try:
        keys = [json.loads(line)["key"] for line in quarantine.read_text().splitlines()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [*differences, f"{quarantine.name}: missing, or not what was written"]
    count = manifest.get("quarantined", len(keys))
    if len(keys) != count:
        differences.append(f"{quarantine.name}: {len(keys)} images, the manifest says {count}")
    return differences


def _classes(file: Path) -> list[str]:
    return file.read_text("utf-8", "surrogateescape").splitlines() if file.is_file() else []


@dataclass(frozen=True)
class _Shard:
    """Checks one shard. Travels to worker processes."""

    out: Path
    class_file: str
    members: list[str]
    look: Look

    def __call__(self, entry: dict) -> tuple[list[str], np.ndarray, np.ndarray, Counter]:
        """Differences, 128-bit digests of the keys, the table that the tar itself gives, and the samples' sums."""
        path = self.out / entry["file"]
        sums: Counter[str] = Counter()
        if not path.is_file():
            return [f"{path.name}: missing"], np.empty((0, 2), "<u8"), np.empty(0, SAMPLE), sums
        differences = []
        if (size := path.stat().st_size) != entry["bytes"]:
            differences.append(f"{path.name}: {size} bytes, the manifest says {entry['bytes']}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                differences.append(f"{path.name}: sha256 differs from the manifest's")
        classes = _classes(self.out / self.class_file)
        samples: dict[str, dict[str, tar.Member]] = {}
        rows, lines = [], []
        with closing(tar.PlainFile(path)) as source:
            try:
                walk = tar.Walk(source, strict=True)
                for member in walk:
                    key, _, extension = member.name.partition(".")
                    if extension in samples.setdefault(key, {}):
                        differences.append(f"{path.name}: {member.name} is there twice")
                    samples[key][extension] = member
                differences += [f"{path.name}: {note}" for note in walk.notes]
            except tar.TarError as error:
                differences.append(str(error))
            for key, parts in samples.items():
                if list(parts) != self.members:
                    wanted = f"{', '.join(parts)} instead of {', '.join(self.members)}"
                    differences.append(f"{path.name}: sample {key} has {wanted}")
                    continue

                def read(extension: str, parts: dict[str, tar.Member] = parts) -> bytes:
                    return source.read_at(parts[extension].offset, min(parts[extension].size, _LARGEST))

                found = self.look(key, read, classes)
                differences += [f"{path.name}: {difference}" for difference in found.differences]
                sums.update(found.sums or {})
                image = parts[self.members[0]]
                rows.append((0, image.offset, image.size, found.height, found.width, found.label))
                lines.append(writer.index_line([(end, p.offset, p.size, p.name) for end, p in parts.items()]))
        if len(samples) != entry["samples"]:
            differences.append(f"{path.name}: {len(samples)} samples, the manifest says {entry['samples']}")
        index = path.with_suffix(".idx")
        if not index.is_file():
            differences.append(f"{index.name}: missing")
        elif index.read_bytes() != writer.index_bytes(lines):
            differences.append(f"{index.name}: is not the index of {path.name}")
        table = np.array(rows, dtype=SAMPLE)
        differences += _table(path.with_suffix(".samples.npy"), table)
        return differences, _digests(samples), table, sums


def _json(content: bytes) -> dict[str, Any]:
    try:
        loaded = json.loads(content)
        return loaded if isinstance(loaded, dict) else {}
    except (ValueError, RecursionError):
        return {}


def _table(path: Path, wanted: np.ndarray) -> list[str]:
    """Never unpickled: an object array is a difference like any other."""
    if not path.is_file():
        return [f"{path.name}: missing"]
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        return [f"{path.name}: unreadable ({error})"]
    same = found.dtype == wanted.dtype and found.shape == wanted.shape and found.tobytes() == wanted.tobytes()
    return [] if same else [f"{path.name}: differs from what the tars hold"]


def _digests(keys: Mapping[str, Any]) -> np.ndarray:
    """u64 (keys, 2)"""
    digests = (hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest() for key in keys)
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


def _duplicates(keys: list[np.ndarray], files: list[str]) -> list[str]:
    if not keys:
        return []
    digest = np.concatenate(keys)
    shard = np.repeat(np.arange(len(keys)), [len(one) for one in keys])
    order = np.lexsort((digest[:, 1], digest[:, 0]))
    same = np.flatnonzero((digest[order][1:] == digest[order][:-1]).all(axis=1))
    if not len(same):
        return []
    one, other = (files[shard[order[same[0] + step]]] for step in (0, 1))
    return [f"{len(same)} key(s) in two shards, e.g. one in {one} and in {other}"]
