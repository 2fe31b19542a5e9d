"""The split's metadata, once every shard has its record; and what lies in a target already."""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, features

from . import SourceError, tars
from .plan import Plan
from .writing import printable, put, record_path, work_folder

TOOL_VERSION = "1.0"


def done(plan: Plan, out: Path, shard: int) -> bool:
    """The record is there, and so is the shard it speaks of."""
    if not record_path(work_folder(out, plan), shard).exists():
        return False
    entry = read_record(plan, out, shard)["entry"]
    return entry["samples"] == 0 or whole(out, entry)


def whole(out: Path, entry: dict) -> bool:
    """A shard's files lie there and its tar has the size that the entry says."""
    tar = out / entry["file"]
    beside = (tar.with_suffix(".idx"), tar.with_suffix(".samples.npy"))
    return tar.is_file() and tar.stat().st_size == entry["bytes"] and all(file.is_file() for file in beside)


def read_record(plan: Plan, out: Path, shard: int) -> dict:
    return read_json(record_path(work_folder(out, plan), shard))


def read_json(path: Path) -> dict:
    """One of the JSON objects that this tool wrote."""
    try:
        said = json.loads(path.read_text())
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise SourceError(f"{path} is damaged: delete it and run the same command again")
    return said


def own_file(out: Path, split: str, name: str) -> Path:
    """`name` for the folder's first split, `<split>.name` for every further one."""
    first = out / "manifest.json"
    taken = first.exists() and read_json(first).get("split") != split
    return out / (f"{split}.{name}" if taken else name)


def merge(plan: Plan, out: Path, *, strict: bool = False) -> dict:
    """The split's table, quarantine list, class list, timm's info and, last, the manifest, which is returned.

    When `strict` and anything is quarantined, only the quarantine list is written.
    """
    work = work_folder(out, plan)
    records = [read_record(plan, out, shard) for shard in range(plan.shards)]
    entries = [record["entry"] for record in records if record["entry"]["samples"]]
    lines = [{"key": None, "reason": why, "source": printable(name), "shard": None} for name, why in plan.refused]
    lines += [line for record in records for line in record["quarantine"]]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    put(own_file(out, plan.split, "quarantine.jsonl"), text, work)
    notes: dict[str, int] = {}
    for record in records:
        for note, count in record["notes"].items():
            notes[note] = notes.get(note, 0) + count
    manifest = {
        "format": 1,
        "name": plan.name,
        "split": plan.split,
        "tool_version": TOOL_VERSION,
        "codec": f"Pillow {Image.__version__}, libjpeg-turbo {features.version_feature('libjpeg_turbo')}",
        "seed": plan.seed,
        "options": plan.options,
        "source": plan.source,
        "num_samples": sum(entry["samples"] for entry in entries),
        "num_classes": len(plan.classes),
        "repaired": sum(entry["repaired"] for entry in entries),
        "quarantined": len(lines),
        "counts": dict(sorted(notes.items())),
        "shards": entries,
    }
    if not entries:
        raise SourceError(f"no image of {plan.root} is sound: {out / 'quarantine.jsonl'} says why")
    if strict and lines:
        return manifest
    put(out / f"{plan.name}-{plan.split}.samples.npy", tars.npy_bytes(_merged_table(out, entries)), work)
    if plan.classes:
        put(out / "synsets.txt", _class_lines(plan), work)
    put(out / "_info.json", json.dumps(_info(plan, out, entries), indent=1).encode(), work)
    put(own_file(out, plan.split, "manifest.json"), json.dumps(manifest, indent=1).encode(), work)
    return manifest


def _merged_table(out: Path, entries: list[dict]) -> np.ndarray:
    parts = []
    for position, entry in enumerate(entries):
        part = np.load(out / entry["file"].replace(".tar", ".samples.npy"))
        part["shard"] = position
        parts.append(part)
    return np.concatenate(parts)


def _class_lines(plan: Plan) -> bytes:
    return "".join(f"{name}\n" for name in plan.classes).encode("utf-8", "surrogateescape")


def _info(plan: Plan, out: Path, entries: list[dict]) -> dict:
    """timm's `_info.json`, with the other splits of the folder kept."""
    path = out / "_info.json"
    before = read_json(path).get("splits", {}) if path.exists() else {}
    split = {
        "name": plan.split,
        "filenames": [entry["file"] for entry in entries],
        "shard_lengths": [entry["samples"] for entry in entries],
        "num_samples": sum(entry["samples"] for entry in entries),
    }
    return {"name": plan.name, "splits": dict(sorted({**before, plan.split: split}.items()))}


def check_target(plan: Plan, out: Path) -> dict | None:
    """What lies in `out` already: None to begin or go on, the manifest when the split is finished.

    Raises SourceError where it is another set, so that two never mix.
    """
    path = own_file(out, plan.split, "manifest.json")
    if path.exists():
        manifest = read_json(path)
        for field in ("name", "seed", "options", "source"):
            if manifest.get(field) != getattr(plan, field):
                raise SourceError(
                    f"{path} is of another set: {_difference(field, manifest.get(field), getattr(plan, field))}; "
                    f"choose another OUT, or delete that set"
                )
        return manifest
    synsets = out / "synsets.txt"
    if plan.classes and synsets.exists() and synsets.read_bytes() != _class_lines(plan):
        raise SourceError(
            f"{synsets} lists other classes than {plan.root}: say --classes {synsets}, or choose another OUT"
        )
    started = work_folder(out, plan) / "plan.json"
    if started.exists():
        before = read_json(started)
        for field in ("seed", "options", "source", "classes"):
            if before[field] != getattr(plan, field):
                raise SourceError(
                    f"{out} holds an unfinished run with {_difference(field, before[field], getattr(plan, field))}; "
                    f"repeat that command, or delete {started.parent} and its shards"
                )
    return None


def _difference(field: str, before: object, now: object) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        field, before, now = next(
            (f"{field}.{name}", before.get(name), now.get(name))
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        )
    if isinstance(before, list):
        return f"other {field}"
    return f"{field} = {before!r} there, {now!r} here"


def clean_up(plan: Plan, out: Path) -> None:
    shutil.rmtree(work_folder(out, plan), ignore_errors=True)
