"""Folders and files of a source, on this machine or at an address, with one interface for both."""

import errno
import io
import os
import stat
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TypeVar

from pipeline import remote, tar
from pipeline.remote import Folder, Object

_AHEAD = 4  # parts fetched ahead while a tar is read from start to end
_LISTINGS = 16  # concurrent listings of folders
A = TypeVar("A")
B = TypeVar("B")
Wanted = Callable[[str], bool]
Sizes = Iterator[tuple[str, int | None]]
"""Pairs of a file's name and its size in bytes, or None if it is not a regular file."""


@dataclass(frozen=True)
class Address:
    """A file or a folder in a bucket, or a file on a web server, with the methods of Path that a source needs."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> "tuple[type[Address], tuple[str]]":  # without cached answers
        return Address, (self.url,)

    def __truediv__(self, name: str) -> "Address":
        return Address(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "Address":
        return Address(self.url.rpartition("/")[0])

    def resolve(self) -> "Address":
        return self

    @cached_property
    def object(self) -> Object | None:
        Folder(self.url)  # raises for an invalid address
        folder, _, name = self.url.rpartition("/")
        return None if folder.endswith("/") else remote.run(Folder(folder).head(name))  # s3://bucket is no object

    @cached_property
    def entries(self) -> tuple[list[str], dict[str, Object]]:
        return remote.run(Folder(self.url).entries())

    def is_file(self) -> bool:
        return self.object is not None

    def is_dir(self) -> bool:
        return Folder(self.url).lists and any(self.entries)

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()


Place = Path | Address


def entries(folder: Place) -> tuple[list[str], list[str]]:
    """The names of the folders in a folder, including links to folders, and of everything else, sorted by bytes."""
    if isinstance(folder, Address):
        folders, files = folder.entries[0], [*folder.entries[1]]
    else:
        folders, files = next(os.walk(folder, onerror=_raise))[1:]
    return sorted(folders, key=os.fsencode), sorted(files, key=os.fsencode)


def directly(root: Place, names: Iterable[str], wanted: Wanted) -> Sizes:
    """The wanted files directly in a folder, with their sizes; `names` are its files."""
    if isinstance(root, Address):
        sizes = root.entries[1]
        return ((name, sizes[name].size) for name in names if wanted(name))
    return ((name, _size(root / name)) for name in names if wanted(name))


def below(root: Place, folders: Iterable[str], wanted: Wanted) -> Iterator[tuple[str, Sizes]]:
    """Yield each of `folders` with the wanted files in it and in its subfolders, named relative to `root`."""
    if isinstance(root, Address):
        for name, found in _ahead(folders, lambda name: remote.submit(Folder(root.url).below(name)), _LISTINGS):
            yield name, ((name, one.size) for name, one in sorted(found.items()) if wanted(name))
        return
    for name in folders:
        yield name, _walk(root, name, wanted)


def _walk(root: Path, name: str, wanted: Wanted) -> Sizes:
    for folder, inner, files in os.walk(root / name, onerror=_raise):  # does not follow links to folders
        inner.sort(key=os.fsencode)
        relative = Path(folder).relative_to(root)
        for file in sorted(files, key=os.fsencode):
            if wanted(file):
                yield f"{relative}/{file}", _size(f"{folder}/{file}")


def _size(path: str | Path) -> int | None:
    """The size of a regular file, else None. Links to files are followed, as by every reader."""
    try:
        found = os.stat(path)  # noqa: PTH116 - called once per image, pathlib is slow
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):  # a link to nothing, or to itself
            raise
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _raise(error: OSError) -> None:
    raise error


def file(place: Place) -> Path | Object:
    """Return an existing file in the form that plans store."""
    if isinstance(place, Path):
        return place
    assert place.object
    return place.object


def open_bytes(found: Path | Object) -> tar.PlainFile | tar.GzipFile | tar.Bytes:
    """Open a tar, compressed or not, as its first bytes say. Raises OSError."""
    if isinstance(found, Path):
        return tar.open_bytes(found)
    if remote.run(found.read(0, 2)) == b"\x1f\x8b":
        return tar.GzipFile(found, io.BufferedReader(remote.Reader(found)))
    return _parts(found)


def plain(found: Path | Object) -> tar.PlainFile | tar.Bytes:
    """Open an uncompressed tar."""
    return tar.PlainFile(found) if isinstance(found, Path) else _parts(found)


def _parts(wanted: Object) -> tar.Bytes:
    """Return a reader for an object that is read mostly forwards, in parts that are fetched ahead.

    Many small requests, one for each header of a tar, would each wait for an answer. Parts are many times as fast.
    """
    coming: dict[int, Future[bytes]] = {}

    def part(number: int) -> bytes:
        for ahead in range(number, number + _AHEAD):
            start = ahead * remote.PART
            if start < wanted.size and ahead not in coming:
                coming[ahead] = remote.submit(wanted.read(start, start + remote.PART))
        for passed in [other for other in coming if not number - 1 <= other < number + _AHEAD]:
            coming.pop(passed).cancel()
        return remote.wait(coming[number])

    def read_at(offset: int, size: int) -> bytes:
        stop = min(offset + size, wanted.size)
        found = b""
        while offset < stop:
            number, within = divmod(offset, remote.PART)
            found += part(number)[within : within + stop - offset]
            offset = min(stop, (number + 1) * remote.PART)
        return found

    return tar.Bytes(read_at, wanted, wanted.size, lambda: [future.cancel() for future in coming.values()])


def read_all(wanted: Iterable[tuple[Object, int, int]], ahead: int) -> Iterator[bytes]:
    """Yield the bytes of the ranges (object, first byte, end) in order, read `ahead` at a time. Raises ReadError."""
    for _, data in _ahead(wanted, lambda each: remote.submit(each[0].read(*each[1:])), ahead):
        yield data


def _ahead(wanted: Iterable[A], start: Callable[[A], "Future[B]"], most: int) -> Iterator[tuple[A, B]]:
    """Yield each item of `wanted` with its result, in order. Up to `most` are in flight."""
    rest = iter(wanted)
    coming = deque((each, start(each)) for each in islice(rest, most))
    try:
        while coming:
            each, future = coming.popleft()
            yield each, remote.wait(future)
            coming.extend((more, start(more)) for more in islice(rest, 1))
    finally:
        for _, future in coming:
            future.cancel()


_scratch: list[tempfile.TemporaryDirectory] = []  # until this process ends


def nearby(folder: Place, names: Iterable[str]) -> Path:
    """Return a local folder with the named files and folders of `folder`, as far as they exist."""
    if isinstance(folder, Path):
        return folder
    _scratch.append(tempfile.TemporaryDirectory())
    here = Path(_scratch[-1].name)
    folders, files = folder.entries
    found = {name: files[name] for name in names if name in files}
    for name in names:
        if name in folders:
            found |= remote.run(Folder(folder.url).below(name))
    for name, data in zip(found, read_all(((one, 0, one.size) for one in found.values()), _AHEAD), strict=True):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(data)
    return here
