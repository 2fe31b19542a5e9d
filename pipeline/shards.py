"""A set of WebDataset shards as one numbered list of images.

A table holds the location of each image (see `tables`). Images are read by position, so any order costs the same.
"""

import hashlib
import os
import resource
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from copy import copy
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from . import tables, tar
from .host import cache_folder, digest
from .specs import ShardError, Spec, is_address, resolve, with_split
from .tables import IMAGES, SAMPLE, split_name

if TYPE_CHECKING:
    import webdataset

    from .remote import Object
    from .remote_files import RemoteFiles
    from .shard_cache import Figures

__all__ = ["SAMPLE", "ReadError", "ShardError", "ShardSet", "Spec"]

CACHE_SIZE = 16.0
"""Default size in GB of the local cache for a remote set: room for two windows of the block order and more."""
MASK = "seg.png"


class ReadError(OSError):
    """Stored bytes cannot be read: an outage, which says nothing about the images."""

    passes = True
    """Whether waiting may help: not if the bytes are gone or have changed, or access is denied."""


class ShardSet:
    """The images of a directory of tars, a brace pattern (``dir/x-{0000..1023}.tar``) or a list of tars, numbered.

    For a directory with several splits, `split` selects one, as ``DIRECTORY:SPLIT`` does. Each of these may be an
    address: ``s3://``, ``gs://``, ``az://``, ``http(s)://``. Then `paths` holds objects that convert to their address
    with `str`. All processes of this machine share a cache of shards, up to `cache_size` GB (1e9 bytes; 0: no cache) in
    the folder `cache` (default: "shards" in the user's cache folder).

    `table` holds one SAMPLE row per image, memory-mapped if one file holds all rows. `fingerprint` identifies the set
    by its shards' names, sizes and counts, independent of its location. The set includes images that cannot be decoded.
    Raises ShardError if the set is missing, denied, empty, ambiguous, without images or not a tar, and ReadError if a
    server does not answer.
    """

    def __init__(
        self,
        spec: Spec,
        split: str | None = None,
        *,
        cache: str | os.PathLike[str] | None = None,
        cache_size: float = CACHE_SIZE,
    ):
        if not 0 <= cache_size < inf:
            raise ShardError(f"cache_size {cache_size} must be a number of GB, 0 or more")
        entries = [os.fspath(spec)] if isinstance(spec, str | os.PathLike) else [os.fspath(entry) for entry in spec]
        if split is None and len(entries) == 1:
            entries[0], split = with_split(entries[0])
        self.paths: Sequence[Path | Object]
        self._files: _Files | RemoteFiles
        self._made_by = partial(ShardSet, cache=cache, cache_size=cache_size)
        self.remote = any(is_address(entry) for entry in entries)
        """Whether the shards are at addresses: then `figures` holds the cost of reading them."""
        if self.remote:
            local = next((entry for entry in entries if not is_address(entry)), None)
            if local:
                raise ShardError(f"{local!r} is a local file in a list of addresses: name only files or addresses")
            from .remote_set import open_set

            root = Path(cache) if cache is not None else cache_folder("shards")
            self.paths, self.table, self._files = open_set(entries, split, root, int(cache_size * 1e9))
            files = [(found.name, found.size) for found in self.paths]
        else:
            paths, manifest = resolve(entries, split)
            self.paths, self.table, self._files = paths, tables.of_shards(paths, manifest), _Files(paths)
            files = [(path.name, path.stat().st_size) for path in paths]
        if not len(self.table):
            raise ShardError(f"{_name(self.paths)} holds no images: members must be named KEY.{'|'.join(IMAGES)}")
        shard = self.table["shard"]
        self.first = np.array([bisect_left(shard, s) for s in range(len(self.paths) + 1)], dtype=np.int64)
        """i64 (shards + 1,): the first image of each shard, then the number of images."""
        counts = np.diff(self.first).tolist()
        content = [[*file, count] for file, count in zip(files, counts, strict=True)]
        self.fingerprint = digest(content)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"ShardSet of {len(self):,} images in {len(self.paths):,} shards: {_name(self.paths)}"

    def __reduce__(self) -> "tuple[Callable[..., ShardSet], tuple[list[str]]]":
        return self._made_by, ([str(path) for path in self.paths],)

    def shard_of(self, i: int) -> "Path | Object":
        """Return the tar that holds image `i`; `str` of it is its path or address."""
        return self.paths[self.table["shard"][i]]

    def key(self, i: int) -> str:
        """Return the WebDataset key of image `i`: its member's name up to the first dot. Raises OSError."""
        row = self.table[i]
        name = self._files.name(int(row["shard"]), int(row["offset"]))
        return _printable(split_name(name)[0]) if name else f"byte {row['offset']}"

    def read(self, i: int) -> bytes:
        """Return the stored bytes of image `i`; fewer than in the table if the shard is now shorter. Raises OSError."""
        row = self.table[i]
        return self._files.read(int(row["shard"]), int(row["offset"]), int(row["size"]))

    def read_mask(self, i: int) -> bytes | None:
        """Return the stored label map of image `i`, its member KEY.seg.png, or None if it has none. Raises OSError.

        Tables hold no locations of label maps, so a table is the same with and without them. Our sharder puts each
        label map directly after its image, where two reads find it. To find others, the shard's headers are scanned
        once. In a remote set this requires the shard to be in the cache.
        """
        row = self.table[i]
        shard, offset = int(row["shard"]), int(row["offset"])
        mask = (split_name(self._files.name(shard, offset) or "")[0], MASK)
        read = partial(self._files.read, shard)
        member = tar.member_at(read, offset + tar.padded(int(row["size"])))
        if member is None or split_name(member.name) != mask:
            places = (at for at, name in self._files.names(shard).items() if mask[0] and split_name(name) == mask)
            at = next(places, None)
            member = None if at is None else tar.member_at(read, at - tar.BLOCK)
        return None if member is None else read(member.offset, member.size)

    def listed(self, name: str) -> list[str]:
        """Return the lines of a file beside the first shard: classes.txt or synsets.txt, whose line numbers are labels.

        Line numbers begin at 0. Empty if there is none, as beside a remote set. Raises ValueError if it is no text.
        """
        path = Path(str(self.paths[0])).with_name(name)
        try:
            return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        except UnicodeDecodeError:
            raise ValueError(f"{path}: is no text in UTF-8; it names the classes, one a line") from None

    def only(self, names: Iterable[str]) -> "ShardSet":
        """Return a set of the named images: `names` are keys or file names, with or without folders and extension.

        The images keep their stored order and get new numbers. Raises ValueError for a name of no image, or of two.
        """
        names = names if isinstance(names, str) else [*names]
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"names must be a list of strings, not {names!r:.60}")
        wanted = {split_name(name)[0] for name in names}
        places: dict[str, int] = {}
        for i in range(len(self)):
            key = self.key(i)
            name = key if key in wanted else key.rpartition("/")[2]
            if name in wanted and places.setdefault(name, i) != i:
                raise ValueError(f"{_name(self.paths)} has two images {name!r}: a list of names cannot tell them apart")
        if lacking := wanted - places.keys():
            listed = f"{len(lacking):,} of the {len(wanted):,} names listed are absent"
            raise ValueError(f"{_name(self.paths)} has no image {min(lacking)!r}; {listed}")
        if not places:
            raise ValueError(f"no image of {_name(self.paths)} is listed")
        return self._at(np.array(sorted(places.values()), dtype=np.int64))

    def _at(self, index: NDArray[np.int64]) -> "ShardSet":
        chosen = copy(self)
        chosen.table = self.table[index]
        chosen.first = np.searchsorted(index, self.first)
        content = self.fingerprint.encode() + index.tobytes()
        chosen.fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()
        chosen._made_by = partial(_chosen, self._made_by, index)
        return chosen

    def open(self, shard: int) -> BinaryIO:
        """Open a shard for reading from its start. Raises OSError."""
        return self._files.open(shard)

    def webdataset(self, shardshuffle: "int | bool" = False, **options: Any) -> "webdataset.WebDataset":
        """Return the shards as a WebDataset pipeline, for code that uses webdataset: dicts of bytes by extension.

        `options` are those of WebDataset, except its cache. This call switches webdataset to its secure mode for the
        whole process: it unpickles nothing, and opens no file or command itself (WDS_SECURE=0 keeps the mode off).
        """
        from .streams import as_webdataset

        return as_webdataset(self, shardshuffle, **options)

    def advise(self, indices: NDArray[np.int64]) -> None:
        """Ask the operating system to prefetch these images, all at once, before they are read one by one."""
        self._files.advise(self.table[indices])

    def expect(self, order: Sequence[int], ahead: int) -> None:
        """Announce the order in which shards will be read. A remote set downloads the first `ahead` shards whole and
        may evict other shards from the cache for them.
        """
        self._files.expect(order, ahead)

    @property
    def usual_size(self) -> tuple[int, int]:
        """The 99th percentiles of height and width in pixels, from some ten thousand images."""
        some = self.table[:: max(1, len(self) // 10_000)]
        return int(np.quantile(some["height"], 0.99)), int(np.quantile(some["width"], 0.99))

    @property
    def figures(self) -> "Figures | None":
        """The cost so far of reading a remote set in this process; None for a local set."""
        return self._files.figures


class OpenShard:
    """An open file descriptor. `names` maps content offsets to member names; it is empty until a scan was needed."""

    __slots__ = ("fd", "names")

    def __init__(self, fd: int):
        self.fd, self.names = fd, dict[int, str]()

    def __del__(self) -> None:  # runs after the last reader has dropped its reference
        os.close(self.fd)


class OpenShards(ABC):
    """Shards read by position. Closes the least recently used if too many are open. Thread-safe."""

    def __init__(self) -> None:
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # limit of open files for this process
        self._most = max(16, min(allowed, 1 << 16) // 2)

    @abstractmethod
    def _descriptor(self, shard: int) -> int | None:
        """Open a shard; return None if it is not on this machine. Raises OSError."""

    @abstractmethod
    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Return `size` bytes of a shard from `offset`; fewer at its end. Raises OSError."""

    def _file(self, shard: int) -> OpenShard | None:
        with self._lock:
            file = self._open.pop(shard, None)
            if file is None and (fd := self._descriptor(shard)) is not None:
                file = OpenShard(fd)
            if file:
                self._open[shard] = file
            if len(self._open) > self._most:
                self._open.popitem(last=False)
            return file

    def name(self, shard: int, offset: int) -> str | None:
        """Return the name of the member whose content starts at `offset`, or None if unknown. Raises OSError."""
        start = max(0, offset - tar.NEAR)
        return tar.name_before(self.read(shard, start, offset - start)) or self.names(shard).get(offset)

    def names(self, shard: int) -> dict[int, str]:
        """Scan a shard for its members' names by content offset. Returns {} if the shard is not on this machine."""
        file = self._file(shard)
        if file is None:
            return {}
        if not file.names:
            file.names = tar.names(file.fd)
        return file.names

    def _read_ahead(self, rows: NDArray[np.void]) -> list[tuple[int, int, int]]:
        """Ask the system to prefetch images (SAMPLE rows). Returns (shard, offset, size) of those on other machines."""
        elsewhere = []
        for shard, offset, size in zip(*(rows[name].tolist() for name in ("shard", "offset", "size")), strict=True):
            with suppress(OSError):  # the read that follows will report the error
                if file := self._file(shard):
                    os.posix_fadvise(file.fd, offset, size, os.POSIX_FADV_WILLNEED)
                else:
                    elsewhere.append((shard, offset, size))
        return elsewhere


class _Files(OpenShards):
    """Shards on this machine."""

    figures = None

    def __init__(self, paths: Sequence[Path]):
        super().__init__()
        self._paths = paths

    def _descriptor(self, shard: int) -> int:
        return os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        file = self._file(shard)
        assert file
        try:
            return tar.read_at(file.fd, offset, size)
        except OSError:  # reopen the file at the next attempt: a stale handle stays stale
            with self._lock:
                self._open.pop(shard, None)
            raise

    def advise(self, rows: NDArray[np.void]) -> None:
        self._read_ahead(rows)

    def expect(self, order: Sequence[int], ahead: int) -> None:
        """No-op: the system's own read-ahead is as good."""

    def open(self, shard: int) -> BinaryIO:
        return self._paths[shard].open("rb")


def _name(paths: Sequence[object]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def _chosen(made_by: "Callable[[list[str]], ShardSet]", index: NDArray[np.int64], paths: list[str]) -> ShardSet:
    return made_by(paths)._at(index)


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
