"""Sample tables: the shard, byte offset, sizes and label of each image of a set.

Our sharder stores them beside its shards. For other shards, one scan of each tar's headers makes the table, which is
then cached in the user's cache folder. Index files are not read, so a stale index does no harm.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import headers, tar
from .host import cache_folder, digest, json_object, write_atomic
from .specs import ShardError, find_manifests

SAMPLE = np.dtype(
    [("shard", "<i4"), ("offset", "<i8"), ("size", "<i4"), ("height", "<i4"), ("width", "<i4"), ("label", "<i4")]
)
IMAGES = ("jpg", "jpeg", "png", "webp")
SCAN = 2  # version: increment when a scan of the same bytes gives another table

_HEAD = 2048  # bytes to read for an image's size; long EXIF or ICC segments need more
_LARGEST_JSON = 1 << 20
_log = logging.getLogger(__name__)


def of_shards(paths: Sequence[Path], manifest: dict | None) -> NDArray[np.void]:
    if manifest and all(path.stat().st_size == s["bytes"] for path, s in zip(paths, manifest["shards"], strict=True)):
        merged = paths[0].parent / f"{manifest['name']}-{manifest['split']}.samples.npy"
        table = load(merged, len(paths))
        if table is not None and len(table) == manifest["num_samples"]:
            return table
    tables: list[NDArray[np.void] | None] = [_sidecar(path) for path in paths]
    foreign = [path for path, table in zip(paths, tables, strict=True) if table is None]
    if foreign:
        scanned = _scan_all(foreign)
        if len(foreign) == len(paths):
            return scanned
        parts = iter(np.split(scanned, np.searchsorted(scanned["shard"], np.arange(1, len(foreign)))))
        tables = [next(parts) if table is None else table for table in tables]
    return joined([table for table in tables if table is not None])


def joined(tables: Sequence[NDArray[np.void]]) -> NDArray[np.void]:
    out = np.empty(sum(len(table) for table in tables), SAMPLE)
    end = 0
    for shard, table in enumerate(tables):
        part = out[end : end + len(table)]
        part[:] = table
        part["shard"] = shard
        end += len(table)
    return out


def load(path: Path, shards: int) -> NDArray[np.void] | None:
    """Load a table of `shards` shards. Returns None if the file is missing or damaged, or the table is implausible."""
    try:
        table = np.lib.format.open_memmap(path, mode="r")
    except Exception:  # a damaged header raises many types
        return None
    if table.dtype != SAMPLE or table.ndim != 1 or not len(table):
        return None
    shard = table["shard"]
    ascending = shard[0] >= 0 and shard[-1] < shards and (shard[1:] >= shard[:-1]).all()
    return table if ascending and table["offset"].min() >= 0 and table["size"].min() >= 0 else None


@lru_cache(maxsize=8)
def _listed(folder: Path, stamps: tuple[int, ...]) -> dict[str, dict]:
    return {shard["file"]: shard for manifest in find_manifests(folder).values() for shard in manifest["shards"]}


def _sidecar(path: Path) -> NDArray[np.void] | None:
    """Load the table beside one of our shards. Returns None unless the manifest still matches the tar."""
    beside = path.with_suffix(".samples.npy")
    if not beside.is_file():
        return None
    stamps = tuple(p.stat().st_mtime_ns for p in sorted(path.parent.glob("*manifest.json")))
    listed = _listed(path.parent, stamps).get(path.name)
    table = load(beside, 1)
    if listed is None or table is None or listed["bytes"] != path.stat().st_size or listed["samples"] != len(table):
        return None
    return table


def _scan_all(paths: Sequence[Path]) -> NDArray[np.void]:
    """Return the table of shards without tables: from the cache if they have not changed, else by a scan."""
    stats = [path.stat() for path in paths]
    stamp = [[str(p.resolve()), s.st_size, s.st_mtime_ns] for p, s in zip(paths, stats, strict=True)]
    name = f"{digest([SCAN, stamp])}.npy"
    kept = cached(name, len(paths))
    if kept is not None:
        return kept
    _log.info("reading the headers of %d shards, once: their table is kept in the user's cache", len(paths))
    with ThreadPoolExecutor(min(16, len(paths))) as pool:
        scans = list(pool.map(scan, paths))
    for path, (_, walk) in zip(paths, scans, strict=True):
        report(str(path), path.stat().st_size, walk, alone=len(paths) == 1)
    table = joined([rows for rows, _ in scans])
    if len(table) and not any(walk.notes for _, walk in scans):  # a damaged set is scanned and reported every time
        keep(table, name)
    return table


def report(path: str, size: int, walk: tar.Walk, *, alone: bool) -> None:
    """Log a warning if a scan found a shard damaged. Raises ShardError if the file is not a tar at all."""
    if not walk.is_tar and (alone or size >= tar.BLOCK):
        what = "is empty" if size == 0 else "is not a tar"
        raise ShardError(f"{path} {what}: remove it from the set, or fetch it again")
    if walk.notes:
        _log.warning("%s: %s; the rest of it is used", path, "; ".join(walk.notes))


def cached(name: str, shards: int) -> NDArray[np.void] | None:
    try:
        return load(cache_folder("tables") / name, shards)
    except OSError:  # no home directory
        return None


def keep(table: NDArray[np.void], name: str) -> None:
    try:
        folder = cache_folder("tables")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, lambda file: np.save(file, table))
    except OSError as error:  # the table is in memory; the next start scans again
        _log.warning("the table of these shards cannot be kept: %s", error)


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and extension as WebDataset does: at the first dot of the path's last part."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem) if stem else "", extension.lower()


def scan(path: Path) -> tuple[NDArray[np.void], tar.Walk]:
    try:
        return _scan(path)
    except OSError as error:
        reason = error.strerror or error
        raise ShardError(f"{path} cannot be read ({reason}): make it readable, or leave it out of the set") from None


def _scan(path: Path) -> tuple[NDArray[np.void], tar.Walk]:
    images: dict[str, tar.Member] = {}
    labels: dict[str, int] = {}
    keys: dict[str, None] = {}
    twice: list[str] = []
    beyond: list[str] = []
    with closing(tar.PlainFile(path)) as file:
        walk = tar.Walk(file, strict=False)
        for member in walk:
            key, extension = split_name(member.name)
            if member.kind != "file" or not key or not extension:
                continue
            keys[key] = None
            if extension in IMAGES:
                if key in images:
                    twice.append(key)
                images.setdefault(key, member)
            elif extension == "cls" and member.size <= 32:
                labels[key] = as_int(file.read_at(member.offset, member.size), labels.get(key, -1))
            elif extension == "json" and member.size <= _LARGEST_JSON and key not in labels:
                label = label_in(file.read_at(member.offset, member.size))
                if label is not None:
                    labels[key] = label
        rows = np.zeros(len(images), SAMPLE)
        for row, (key, member) in zip(rows, images.items(), strict=True):
            height, width = _image_size(file, member)
            row["offset"], row["size"] = member.offset, min(member.size, 2**31 - 1)
            row["height"], row["width"], row["label"] = height, width, -1
            if -(2**31) <= labels.get(key, -1) < 2**31:
                row["label"] = labels.get(key, -1)
            else:
                beyond.append(key)
    without = [key for key in keys if key not in images]
    if without and images:
        walk.notes.append(f"{len(without)} samples without an image, the first is {without[0]!r}")
    if twice:
        walk.notes.append(f"{len(twice)} keys with a second image, which is left out, the first is {twice[0]!r}")
    if beyond:
        walk.notes.append(
            f"{len(beyond)} labels beyond 32 bits, which are left out, the first is that of {beyond[0]!r}"
        )
    return rows, walk


def as_int(text: bytes, default: int) -> int:
    try:
        return int(text)
    except ValueError:
        return default


def label_in(text: bytes) -> int | None:
    label = (json_object(text) or {}).get("label")
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def _image_size(file: tar.PlainFile, member: tar.Member) -> tuple[int, int]:
    """Read the height and width of a stored image from its header; (0, 0) if it is no image."""
    wanted = _HEAD
    while True:
        head = file.read_at(member.offset, min(wanted, member.size))
        kind, height, width = headers.image_size(head)
        if kind != headers.MORE:
            return (height, width) if max(height, width) < 2**31 else (0, 0)
        if len(head) < wanted:
            return 0, 0
        wanted = max(2 * wanted, height)  # for MORE, `height` is the number of bytes needed
