"""Is a finished folder what its manifest says? Reads every byte."""

import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from . import SourceError, finishing, pool, tars


def run(out: Path, workers: int) -> list[str]:
    """Every difference found, a sentence each; none is a sound folder. SourceError where there is no manifest."""
    manifests = sorted(out.glob("manifest.json")) + sorted(out.glob("*.manifest.json"))
    if not manifests:
        unfinished = ": the run that writes it is unfinished" if any(out.glob(".*.work")) else ""
        raise SourceError(f"{out} holds no manifest.json{unfinished or ': it is no folder that this tool finished'}")
    differences = [difference for path in manifests for difference in _split(path, workers)]
    entries = [entry for path in manifests for entry in _load(path).get("shards", [])]
    listed = {entry.get("file") for entry in entries if isinstance(entry, dict)}
    differences += [f"{tar.name}: in no manifest" for tar in sorted(out.glob("*.tar")) if tar.name not in listed]
    return differences


def _load(path: Path) -> dict:
    try:
        loaded = json.loads(path.read_text())
        return loaded if isinstance(loaded, dict) else {}
    except (OSError, ValueError):
        return {}


def _split(path: Path, workers: int) -> list[str]:
    manifest, out = _load(path), path.parent
    wanted = ("name", "split", "num_samples", "num_classes", "shards")
    if manifest.get("format") != 1 or any(field not in manifest for field in wanted):
        return [f"{path.name}: no manifest of format 1"]
    fields = {"file", "bytes", "samples", "sha256"}
    if not all(isinstance(entry, dict) and fields <= entry.keys() for entry in manifest["shards"]):
        return [f"{path.name}: an entry of shards is none"]
    if any(Path(entry["file"]).name != entry["file"] for entry in manifest["shards"]):
        return [f"{path.name}: a shard's name leads out of the folder"]
    jobs = [(out, entry, manifest["num_classes"]) for entry in manifest["shards"]]
    differences: list[str] = []
    keys, tables = [], []
    with (
        pool.progress(manifest["num_samples"], f"checking {manifest['split']}") as shown,
        ProcessPoolExecutor(max(1, min(workers, len(jobs))), get_context("spawn")) as processes,
    ):
        for (_, entry, _), (found, digests, table) in zip(jobs, processes.map(_shard, jobs), strict=True):
            differences += found
            keys.append(digests)
            tables.append(table)
            shown.add(len(table), entry["bytes"], 0, 0)
    differences += _duplicates(keys, [entry["file"] for entry in manifest["shards"]])
    total = sum(len(table) for table in tables)
    if total != manifest["num_samples"]:
        differences.append(f"{path.name}: says {manifest['num_samples']} samples, the tars hold {total}")
    for position, table in enumerate(tables):
        table["shard"] = position
    merged = out / f"{manifest['name']}-{manifest['split']}.samples.npy"
    differences += _table(merged, np.concatenate(tables)) if tables else []
    return differences + _metadata(out, manifest) + _quarantine(out, manifest)


def _classes(out: Path) -> list[str]:
    file = out / "synsets.txt"
    return file.read_text("utf-8", "surrogateescape").splitlines() if file.is_file() else []


def _quarantine(out: Path, manifest: dict) -> list[str]:
    file = finishing.own_file(out, manifest["split"], "quarantine.jsonl")
    try:
        keys = [json.loads(line)["key"] for line in file.read_text().splitlines()]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{file.name}: missing, or not what was written"]
    count = manifest.get("quarantined", len(keys))
    return [] if len(keys) == count else [f"{file.name}: {len(keys)} images, the manifest says {count}"]


def _metadata(out: Path, manifest: dict) -> list[str]:
    differences = []
    split = _load(out / "_info.json").get("splits", {}).get(manifest["split"], {})
    said = [split.get(field) for field in ("filenames", "shard_lengths", "num_samples")]
    shards = manifest["shards"]
    if said != [[one["file"] for one in shards], [one["samples"] for one in shards], manifest["num_samples"]]:
        differences.append(f"_info.json: says something else about split {manifest['split']!r}")
    if manifest["num_classes"]:
        count = len(_classes(out))
        if count != manifest["num_classes"]:
            differences.append(f"synsets.txt: {count} classes, the manifest says {manifest['num_classes']}")
    return differences


def _shard(job: tuple[Path, dict, int]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Differences, 128-bit digests of the keys, and the table that the tar itself gives."""
    out, entry, num_classes = job
    path, names = out / entry["file"], _classes(out)
    nothing = np.empty((0, 2), "<u8"), np.empty(0, tars.SAMPLE)
    if not path.is_file():
        return [f"{path.name}: missing"], *nothing
    differences = []
    if (size := path.stat().st_size) != entry["bytes"]:
        differences.append(f"{path.name}: {size} bytes, the manifest says {entry['bytes']}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            differences.append(f"{path.name}: sha256 differs from the manifest's")
    source = tars.Seekable(path)
    samples: dict[str, dict[str, tars.Member]] = {}
    rows, index = [], []
    try:
        for member in tars.walk(source):
            key, _, extension = member.name.partition(".")
            if extension in samples.setdefault(key, {}):
                differences.append(f"{path.name}: {member.name} is there twice")
            samples[key][extension] = member
        for key, parts in samples.items():
            if list(parts) != ["jpg", "cls", "json"]:
                differences.append(f"{path.name}: sample {key} has {', '.join(parts)} instead of jpg, cls, json")
                continue
            label, said = _label(source, parts["cls"]), _said(source, parts["json"])
            if label is None or not -1 <= label < max(num_classes, 0) or (label < 0) != (num_classes == 0):
                differences.append(f"{path.name}: label {label} of {key} is out of range ({num_classes} classes)")
                label = -1
            if 0 <= label < len(names) and said.get("synset") != names[label]:
                differences.append(f"{path.name}: {key} is of {said.get('synset')}, synsets.txt says {names[label]}")
            if said.get("label") != label:
                differences.append(f"{path.name}: {key}.json and {key}.cls give different labels")
            image = parts["jpg"]
            rows.append((0, image.offset, image.size, said.get("height", 0), said.get("width", 0), label))
            index.append(" ".join(f"{end} {part.offset} {part.size} {part.name}" for end, part in parts.items()))
    except SourceError as error:
        differences.append(str(error))
    finally:
        source.close()
    if len(samples) != entry["samples"]:
        differences.append(f"{path.name}: {len(samples)} samples, the manifest says {entry['samples']}")
    beside = path.with_suffix(".idx")
    if not beside.is_file():
        differences.append(f"{beside.name}: missing")
    elif beside.read_bytes() != tars.index_text(index).encode("utf-8", "surrogateescape"):
        differences.append(f"{beside.name}: is not the index of {path.name}")
    table = tars.table(rows)
    differences += _table(path.with_suffix(".samples.npy"), table)
    digests = b"".join(
        hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest() for key in samples
    )
    return differences, np.frombuffer(digests, "<u8").reshape(-1, 2), table


def _label(source: tars.Seekable, member: tars.Member) -> int | None:
    try:
        return int(source.read_at(member.offset, min(member.size, 32)))
    except ValueError:
        return None


def _said(source: tars.Seekable, member: tars.Member) -> dict:
    try:
        said = json.loads(source.read_at(member.offset, min(member.size, 1 << 20)))
        return said if isinstance(said, dict) else {}
    except ValueError:
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
