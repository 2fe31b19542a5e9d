"""A set of WebDataset shards as one numbered list of images.

A table says where each image lies: shard, first byte, length, height and width by its header, label. It comes from
beside our own shards; for others it is found by one walk over their headers and kept in the user's cache
folder. Index files are not read: a stale one cannot hurt. Images are read by position, so that any order costs the
same.
"""

import hashlib
import json
import logging
import os
import re
import resource
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from . import headers, tar
from .host import cache_folder, read_json, write_atomic

if TYPE_CHECKING:
    import webdataset

    from .remote import Object
    from .shard_cache import Figures, RemoteFiles

SAMPLE = np.dtype(
    [("shard", "<i4"), ("offset", "<i8"), ("size", "<i4"), ("height", "<i4"), ("width", "<i4"), ("label", "<i4")]
)
CACHE_SIZE = 16.0
"""GB of a remote set that are kept on this machine's disk, unless told: two windows of the block order and more."""
IMAGES = ("jpg", "jpeg", "png", "webp")
MASK = "seg.png"
Spec = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_SCAN = 2  # counts up when a scan of the same bytes would give another table
_HEAD = 2048  # bytes read for an image's size; a long EXIF or ICC segment asks for more
_LARGEST_JSON = 1 << 20
_MOST_SHARDS = 1_000_000  # in a range of a pattern
_SCHEMES = ("s3://", "gs://", "az://", "http://", "https://")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_log = logging.getLogger(__name__)


class ShardError(ValueError):
    """A shard set that cannot be used, and what to do about it."""


class ReadError(OSError):
    """Stored bytes that cannot be had: an outage, which says nothing about the images."""


class ShardSet:
    """The images of a directory of tars, a brace pattern (``dir/x-{0000..1023}.tar``) or a list of tars, numbered.

    Of a directory with several splits, `split` names one, as ``DIRECTORY:SPLIT`` does. Each may be an address, too:
    ``s3://``, ``gs://``, ``az://``, ``http(s)://``. Then `paths` are objects whose text is their address, and up to
    `cache_size` GB (1e9 bytes; 0: none) of shards are kept in the folder `cache` (default: "shards" in the user's cache
    folder) by all processes of this machine.

    `table` holds one SAMPLE row per image, memory-mapped where one file holds them all; `fingerprint` names the set by
    its shards' names, lengths and counts, wherever it lies. Images that cannot be decoded are listed too. Raises
    ShardError for a set that is missing, denied, empty, no tar, without images or ambiguous, ReadError where a server
    does not answer.
    """

    def __init__(
        self,
        spec: Spec,
        split: str | None = None,
        *,
        cache: str | os.PathLike[str] | None = None,
        cache_size: float = CACHE_SIZE,
    ):
        entries = [os.fspath(spec)] if isinstance(spec, str | os.PathLike) else [os.fspath(entry) for entry in spec]
        if split is None and len(entries) == 1:
            entries[0], split = _with_split(entries[0])
        self.paths: Sequence[Path | Object]
        self._files: _Files | RemoteFiles
        self._made_by = partial(ShardSet, cache=cache, cache_size=cache_size)
        self.remote = any(is_address(entry) for entry in entries)
        """Whether the shards lie elsewhere: then `figures` says what reading them costs."""
        if self.remote:
            local = next((entry for entry in entries if not is_address(entry)), None)
            if local:
                raise ShardError(f"{local!r} is a file among addresses: name one or the other")
            from .remote_set import open_set

            root = Path(cache) if cache is not None else cache_folder("shards")
            self.paths, self.table, self._files = open_set(entries, split, root, int(cache_size * 1e9))
            files = [(found.name, found.size) for found in self.paths]
        else:
            paths, manifest = _resolve(entries, split)
            self.paths, self.table, self._files = paths, _table(paths, manifest), _Files(paths)
            files = [(path.name, path.stat().st_size) for path in paths]
        if not len(self.table):
            raise ShardError(f"{_name(self.paths)} holds no images: members must be named KEY.{'|'.join(IMAGES)}")
        shard = self.table["shard"]
        self.first = np.array([bisect_left(shard, s) for s in range(len(self.paths) + 1)], dtype=np.int64)
        """i64 (shards + 1,): the first image of each shard and, last, the number of images."""
        counts = np.diff(self.first).tolist()
        content = [[*file, count] for file, count in zip(files, counts, strict=True)]
        self.fingerprint = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"ShardSet of {len(self):,} images in {len(self.paths):,} shards: {_name(self.paths)}"

    def __reduce__(self) -> "tuple[Callable[..., ShardSet], tuple[list[str]]]":
        return self._made_by, ([str(path) for path in self.paths],)

    def shard_of(self, i: int) -> "Path | Object":
        """The tar that holds image `i`; as a string, its path or address."""
        return self.paths[self.table["shard"][i]]

    def key(self, i: int) -> str:
        """The WebDataset key of image `i`: its member's name up to the first dot. Raises OSError."""
        row = self.table[i]
        name = self._files.name(int(row["shard"]), int(row["offset"]))
        return _printable(_split_name(name)[0]) if name else f"byte {row['offset']}"

    def read(self, i: int) -> bytes:
        """The stored bytes of image `i`; fewer than the table says where the shard was cut off since. Raises
        OSError.
        """
        row = self.table[i]
        return self._files.read(int(row["shard"]), int(row["offset"]), int(row["size"]))

    def read_mask(self, i: int) -> bytes | None:
        """The stored label map of image `i`, its member KEY.seg.png; None where it has none. Raises OSError.

        No table says where label maps lie, so that a table is the same with and without them. Our sharder puts each
        right behind its image, where two reads find it; for one elsewhere the shard's headers are walked, once. Of a
        remote set those are found only while the shard is in the cache.
        """
        row = self.table[i]
        shard, offset = int(row["shard"]), int(row["offset"])
        mask = (_split_name(self._files.name(shard, offset) or "")[0], MASK)
        read = partial(self._files.read, shard)
        member = tar.member_at(read, offset + tar.padded(int(row["size"])))
        if member is None or _split_name(member.name) != mask:
            places = (at for at, name in self._files.names(shard).items() if mask[0] and _split_name(name) == mask)
            at = next(places, None)
            member = None if at is None else tar.member_at(read, at - tar.BLOCK)
        return None if member is None else read(member.offset, member.size)

    def open(self, shard: int) -> BinaryIO:
        """A shard, to be read from its start. Raises OSError."""
        return self._files.open(shard)

    def webdataset(self, shardshuffle: "int | bool" = False, **options: Any) -> "webdataset.WebDataset":
        """The same shards as a pipeline of webdataset, for code that has one: dicts of bytes by extension.

        `options` are WebDataset's own, but for its cache. From here on webdataset runs in its secure mode, in this
        whole process: it unpickles nothing, and opens no file or command itself (WDS_SECURE=0 keeps the mode off).
        """
        from .streams import as_webdataset

        return as_webdataset(self, shardshuffle, **options)

    def advise(self, indices: NDArray[np.int64]) -> None:
        """Asks the system to fetch these images, all at once, before they are read one by one."""
        self._files.advise(self.table[indices])

    def expect(self, order: Sequence[int], ahead: int) -> None:
        """The order in which shards will be read. Of a remote set the first `ahead` are fetched whole, for which others
        may leave the cache.
        """
        self._files.expect(order, ahead)

    @property
    def figures(self) -> "Figures | None":
        """What reading a remote set has cost this process so far; None for a local one."""
        return self._files.figures


def is_address(text: str) -> bool:
    """Whether `text` names something in a bucket or on a web server."""
    return text.lower().startswith(_SCHEMES)


def _with_split(entry: str) -> tuple[str, str | None]:
    """``DIRECTORY:SPLIT`` in two; a path that exists, a pattern or an address with a port is left alone."""
    spec, _, split = entry.rpartition(":")
    has_path = is_address(spec) and spec.count("/") > 2
    if "/" in split or "}" in split or Path(entry).exists() or not (has_path or Path(spec).is_dir()):
        return entry, None
    return spec, split


class _Files:
    """Open shards, the least recently used ones closed when there are many. Safe to use from several threads."""

    class _File:
        __slots__ = ("fd", "names")

        def __init__(self, path: Path):
            self.names: dict[int, str] = {}  # by offset, once a walk was needed
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

        def __del__(self) -> None:  # not before the last reader lets go
            if hasattr(self, "fd"):
                os.close(self.fd)

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._open: OrderedDict[int, _Files._File] = OrderedDict()
        self._lock = threading.Lock()
        self.figures = None
        self._most = max(16, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 16) // 2)

    def _file(self, shard: int) -> "_Files._File":
        with self._lock:
            file = self._open.pop(shard, None) or self._File(self._paths[shard])
            self._open[shard] = file
            if len(self._open) > self._most:
                self._open.popitem(last=False)
            return file

    def read(self, shard: int, offset: int, size: int) -> bytes:
        file, data = self._file(shard), b""
        try:
            while len(data) < size:  # a network file system may deliver in parts; nothing more is the end
                more = os.pread(file.fd, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError:  # the next attempt opens it again: a stale handle stays stale
            with self._lock:
                self._open.pop(shard, None)
            raise
        return data

    def name(self, shard: int, offset: int) -> str | None:
        """The name of the member whose content starts at `offset`; None where there is no such member."""
        return tar.name_at(self._file(shard).fd, offset) or self.names(shard).get(offset)

    def names(self, shard: int) -> dict[int, str]:
        """The names of all members by the offset of their content, by a walk."""
        file = self._file(shard)
        if not file.names:
            file.names = tar.names(self._paths[shard], file.fd)
        return file.names

    def advise(self, rows: NDArray[np.void]) -> None:
        for shard, offset, size in zip(*(rows[name].tolist() for name in ("shard", "offset", "size")), strict=True):
            with suppress(OSError):  # the read that follows says what is wrong
                os.posix_fadvise(self._file(shard).fd, offset, size, os.POSIX_FADV_WILLNEED)

    def expect(self, order: Sequence[int], ahead: int) -> None:
        """The system's own read-ahead does as well."""

    def open(self, shard: int) -> BinaryIO:
        return self._paths[shard].open("rb")


def _name(paths: Sequence[object]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def _expand(pattern: str) -> list[str]:
    """``a{00..02}b{x,y}`` -> a00bx, a00by, a01bx ..."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    if numbers := _RANGE.fullmatch(found[1]):
        low, high = (int(text) for text in numbers.groups())
        if high - low >= _MOST_SHARDS:
            raise ShardError(f"{pattern!r} names {high - low + 1} shards: {_MOST_SHARDS} are the most")
        choices = [str(k).zfill(len(numbers[1])) for k in range(low, high + 1)]
    elif "," in found[1]:
        choices = found[1].split(",")
    else:
        raise ShardError(f"{pattern!r}: {found[0]} is neither a range {{0000..0099}} nor a list {{a,b}}")
    return list(chain.from_iterable(_expand(pattern[: found.start()] + c + pattern[found.end() :]) for c in choices))


def _resolve(entries: Sequence[str], split: str | None) -> tuple[list[Path], dict | None]:
    """The tars that `entries` name, and the manifest of the split that they are, where there is one."""
    for entry in entries:
        if _ADDRESS.match(entry) and not Path(entry).exists():
            raise ShardError(
                f"{entry!r} is an address or a command that cannot be read image by image: name files or an address "
                f"that begins with {', '.join(_SCHEMES)}, or hand it to a Loader as a pipeline.Stream"
            )
    if len(entries) == 1 and Path(entries[0]).is_dir():
        return _in_directory(Path(entries[0]), split)
    paths = [Path(path) for entry in entries for path in ([entry] if Path(entry).exists() else _expand(entry))]
    if not paths:
        raise ShardError("an empty list of shards: name a directory, a brace pattern or tars")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        if missing[0].is_dir():
            raise ShardError(f"{missing[0]} is a directory among tars: name one directory alone, or tars")
        raise ShardError(
            f"{missing[0]} is missing ({len(missing)} of {len(paths)} shards): "
            "check the path, or make shards with tools/shard_imagenet.py"
        )
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ShardError(f"{twice} is named twice: name each shard once")
    for manifest in _manifests(paths[0].parent).values():
        if paths == [paths[0].parent / shard["file"] for shard in manifest["shards"]]:
            return paths, manifest
    return paths, None


def _in_directory(folder: Path, split: str | None) -> tuple[list[Path], dict | None]:
    manifests = _manifests(folder)
    if manifests:
        manifest = manifests[_one(str(folder), list(manifests), split)]
        return _listed_files(folder, [shard["file"] for shard in manifest["shards"]], "the manifest"), manifest
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ShardError(f"{folder} holds no .tar: name another, or make shards with tools/shard_imagenet.py")
    odd = next((path for path in paths if not path.is_file()), None)
    if odd:  # opening a pipe would hang
        raise ShardError(f"{odd} is no file, or a link to none: remove it, or name the other tars by a pattern")
    infos = (folder / name for name in ("_info.json", "info.json"))
    info = next((info for path in infos if (info := read_json(path))), {})
    splits = _timm_splits(info)
    if split is None and len(splits) <= 1:
        return paths, None
    return _listed_files(folder, splits[_one(str(folder), list(splits), split)], "_info.json"), None


def _one(folder: str, splits: Sequence[str], split: str | None) -> str:
    """The split that is meant. Raises ShardError where that is not clear."""
    if split is None and len(splits) > 1:
        choices = " or ".join(f"{folder}:{name}" for name in splits)
        raise ShardError(f"{folder} holds the splits {', '.join(splits)}: name one, {choices}")
    if split is not None and split not in splits:
        raise ShardError(f"{folder} has no split {split!r}: it holds {', '.join(splits) or 'none that has a name'}")
    return splits[0] if split is None else split


def _listed_files(folder: Path, names: Sequence[str], where: str) -> list[Path]:
    paths = [folder / name for name in names]
    if not paths:
        raise ShardError(f"{folder}: {where} does not say which tars are this split: name them by a pattern")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ShardError(
            f"{missing[0]} is missing ({len(missing)} of the {len(paths)} shards that {where} lists): "
            "restore it, or name the remaining tars one by one"
        )
    return paths


def _timm_splits(info: dict) -> dict[str, list[str]]:
    """The tars by split, as timm's _info.json says it; none of a split of which it does not."""
    splits, found = info.get("splits"), dict[str, list[str]]()
    for name, split in splits.items() if isinstance(splits, dict) else ():
        files = split.get("filenames") if isinstance(split, dict) else None
        files = files if isinstance(files, list) else []
        named = all(isinstance(file, str) and Path(file).name == file for file in files)
        found[str(name)] = files if named else []
    return found


def _manifests(folder: Path) -> dict[str, dict]:
    """Our sharder's manifests in a folder, by split; anything else of that name is left alone."""
    found = {}
    for path in sorted({folder / "manifest.json", *folder.glob("*.manifest.json")}):
        manifest = read_json(path)
        if manifest and manifest.get("format") == 1 and _is_ours(manifest):
            found[str(manifest["split"])] = manifest
    return found


def _is_ours(manifest: dict) -> bool:
    shards = manifest.get("shards")
    return (
        {"name", "split", "num_samples"} <= manifest.keys()
        and isinstance(shards, list)
        and len(shards) > 0
        and all(isinstance(shard, dict) and {"file", "bytes", "samples"} <= shard.keys() for shard in shards)
        and all(isinstance(shard["file"], str) and Path(shard["file"]).name == shard["file"] for shard in shards)
    )


def _table(paths: Sequence[Path], manifest: dict | None) -> NDArray[np.void]:
    if manifest and all(path.stat().st_size == s["bytes"] for path, s in zip(paths, manifest["shards"], strict=True)):
        merged = paths[0].parent / f"{manifest['name']}-{manifest['split']}.samples.npy"
        table = _load(merged, len(paths))
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
    return _joined([table for table in tables if table is not None])


def _joined(tables: Sequence[NDArray[np.void]]) -> NDArray[np.void]:
    out = np.empty(sum(len(table) for table in tables), SAMPLE)
    end = 0
    for shard, table in enumerate(tables):
        part = out[end : end + len(table)]
        part[:] = table
        part["shard"] = shard
        end += len(table)
    return out


def _load(path: Path, shards: int) -> NDArray[np.void] | None:
    """The table of so many shards in a file; None where there is none, or one that no walk would have given."""
    try:
        table = np.lib.format.open_memmap(path, mode="r")
    except Exception:  # a torn header fails in a dozen ways
        return None
    if table.dtype != SAMPLE or table.ndim != 1 or not len(table):
        return None
    shard = table["shard"]
    ascending = shard[0] >= 0 and shard[-1] < shards and (shard[1:] >= shard[:-1]).all()
    return table if ascending and table["offset"].min() >= 0 and table["size"].min() >= 0 else None


@lru_cache(maxsize=8)
def _listed(folder: Path, stamps: tuple[int, ...]) -> dict[str, dict]:
    return {shard["file"]: shard for manifest in _manifests(folder).values() for shard in manifest["shards"]}


def _sidecar(path: Path) -> NDArray[np.void] | None:
    """The table beside one of our shards, if the manifest still describes the tar."""
    beside = path.with_suffix(".samples.npy")
    if not beside.is_file():
        return None
    stamps = tuple(p.stat().st_mtime_ns for p in sorted(path.parent.glob("*manifest.json")))
    listed = _listed(path.parent, stamps).get(path.name)
    table = _load(beside, 1)
    if listed is None or table is None or listed["bytes"] != path.stat().st_size or listed["samples"] != len(table):
        return None
    return table


def _scan_all(paths: Sequence[Path]) -> NDArray[np.void]:
    """The table of shards that bring none: from the cache if they have not changed since, else by a walk."""
    stats = [path.stat() for path in paths]
    stamp = [[str(p.resolve()), s.st_size, s.st_mtime_ns] for p, s in zip(paths, stats, strict=True)]
    name = hashlib.blake2b(json.dumps([_SCAN, stamp]).encode(), digest_size=16).hexdigest() + ".npy"
    cached = _cached(name, len(paths))
    if cached is not None:
        return cached
    _log.info("reading the headers of %d shards, once: their table is kept in the user's cache", len(paths))
    with ThreadPoolExecutor(min(16, len(paths))) as pool:
        scans = list(pool.map(_scan_named, paths))
    for path, (_, walk) in zip(paths, scans, strict=True):
        _complain(str(path), path.stat().st_size, walk, alone=len(paths) == 1)
    table = _joined([rows for rows, _ in scans])
    if len(table) and not any(walk.notes for _, walk in scans):  # a damaged set is scanned, and named, every time
        _keep(table, name)
    return table


def _complain(path: str, size: int, walk: tar.Walk, *, alone: bool) -> None:
    """Says what a walk found wrong with a shard; where it's everything, raises ShardError."""
    if not walk.is_tar and (alone or size >= tar.BLOCK):
        what = "is empty" if size == 0 else "is not a tar"
        raise ShardError(f"{path} {what}: remove it from the set, or fetch it again")
    if walk.notes:
        _log.warning("%s: %s; the rest of it is used", path, "; ".join(walk.notes))


def _cached(name: str, shards: int) -> NDArray[np.void] | None:
    try:
        return _load(cache_folder("tables") / name, shards)
    except OSError:  # no home
        return None


def _keep(table: NDArray[np.void], name: str) -> None:
    try:
        folder = cache_folder("tables")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, lambda file: np.save(file, table))
    except OSError as error:  # the table is in memory; the next start scans again
        _log.warning("the table of these shards cannot be kept: %s", error)


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _split_name(name: str) -> tuple[str, str]:
    """A member's key and extension, as WebDataset splits it: at the first dot of the last part of the path."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem) if stem else "", extension.lower()


def _scan_named(path: Path) -> tuple[NDArray[np.void], tar.Walk]:
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
            key, extension = _split_name(member.name)
            if member.kind != "file" or not key or not extension:
                continue
            keys[key] = None
            if extension in IMAGES:
                if key in images:
                    twice.append(key)
                images.setdefault(key, member)
            elif extension == "cls" and member.size <= 32:
                labels[key] = _int(file.read_at(member.offset, member.size), labels.get(key, -1))
            elif extension == "json" and member.size <= _LARGEST_JSON and key not in labels:
                label = _label_in(file.read_at(member.offset, member.size))
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


def _int(text: bytes, default: int) -> int:
    try:
        return int(text)
    except ValueError:
        return default


def _label_in(text: bytes) -> int | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    label = content.get("label") if isinstance(content, dict) else None
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def _image_size(file: tar.PlainFile, member: tar.Member) -> tuple[int, int]:
    """Height and width of a stored image by its header, (0, 0) where it is none."""
    wanted = _HEAD
    while True:
        head = file.read_at(member.offset, min(wanted, member.size))
        kind, height, width = headers.image_size(head)
        if kind != headers.MORE:
            return (height, width) if max(height, width) < 2**31 else (0, 0)
        if len(head) < wanted:
            return 0, 0
        wanted = max(2 * wanted, height)  # where more is needed, the second number says how much
