"""Listing of a tar's members and their offsets, without reading their contents.

This is our own parser of USTAR, GNU and PAX archives, in a file or a gzip stream. Existing parsers stop at the first
damaged header, trust index files that may be stale, or read PAX archives wrongly. Nothing is ever extracted: a link, a
device or `../../x` is an entry in a list and never a file, and pickles are not opened.
"""

import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_KINDS = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"5": "folder",
    b"6": "FIFO",
    b"S": "sparse file",
}
_OCTAL = re.compile(rb"[\0 ]*([0-7]*)(?:[\0 ].*)?", re.DOTALL)
_MAX_RECORD = 1 << 20  # bytes of a GNU long name or a PAX header: more means damage
_MAX_DIGITS = 18  # digits of a number in a PAX header; Python refuses to parse very long ones
_CHUNK = 1 << 20
NEAR = 4096  # bytes before a member's content that usually contain its name


class TarError(ValueError):
    """A tar or gzip file is damaged; the message names the file and the place."""


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of a tar. `kind` is "file", "folder", "symbolic link" or another type."""

    name: str  # bytes that are not valid UTF-8 are kept as surrogates
    offset: int  # position of its first content byte in the archive
    size: int
    kind: str


def read_at(fd: int, offset: int, size: int) -> bytes:
    """Read `size` bytes of an open file, fewer only at its end. Raises OSError."""
    data = os.pread(fd, size, offset)
    while 0 < len(data) < size:  # signals, network file systems and reads over 2 GiB may return fewer bytes
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


class PlainFile:
    """Reads a file by offset."""

    def __init__(self, path: Path):
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size: int | None = os.fstat(self._fd).st_size

    def read_at(self, offset: int, size: int) -> bytes:
        """Read `size` bytes, fewer only at the end of the file. Raises OSError."""
        return read_at(self._fd, offset, size)

    def close(self) -> None:
        os.close(self._fd)


class GzipFile:
    """Reads a gzip file's content by offset, forwards only. Bytes between two reads are decompressed and dropped."""

    size: int | None = None  # known only at the end

    def __init__(self, path: object, file: BinaryIO | None = None):
        self.path = path
        self._file = gzip.open(file or str(path), "rb")  # noqa: SIM115 - closed by close()
        self._at = 0

    def read_at(self, offset: int, size: int) -> bytes:
        """Read `size` bytes, fewer only at the end. Raises TarError if the file is damaged or cut short."""
        if offset < self._at:
            raise ValueError(f"{self.path}: cannot go back from {self._at} to {offset} in a gzip file")
        try:
            while self._at < offset:
                dropped = len(self._file.read(min(_CHUNK, offset - self._at)))
                if not dropped:
                    return b""
                self._at += dropped
            data = self._file.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise TarError(f"{self.path} is no valid gzip file ({error}): download it again") from None
        self._at += len(data)
        return data

    def finish(self) -> None:
        """Read to the end, which verifies gzip's checksum."""
        while self.read_at(self._at, _CHUNK):
            pass

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Bytes:
    """Reads any other source by offset. `path` is its name in messages."""

    read_at: Callable[[int, int], bytes]
    path: object = ""
    size: int | None = None
    close: Callable[[], object] = lambda: None


def open_bytes(path: Path) -> PlainFile | GzipFile:
    """Open a file as gzip or plain, by its first bytes. Raises OSError."""
    with path.open("rb") as file:
        return GzipFile(path) if file.read(2) == b"\x1f\x8b" else PlainFile(path)


class Walk:
    """Iterates over the members of a tar in order, reading only headers: 512 bytes for each.

    If the tar is damaged or cut short, a strict walk raises TarError. A walk that is not strict records the damage in
    `notes` and continues at the next valid header. A damaged header then costs only its own member. A member that
    extends beyond the end is skipped. A tar must end in a block of zeros, so even a cut exactly between two members is
    detected. Both kinds of walk note any data after that block. `start` and `end` are the bounds of a tar that is
    itself a member, named `inside`, of another tar.
    """

    def __init__(
        self,
        source: PlainFile | GzipFile | Bytes,
        start: int = 0,
        end: int | None = None,
        *,
        strict: bool,
        inside: str = "",
    ):
        self.notes: list[str] = []
        self.is_tar = False
        self._source, self._start, self._strict = source, start, strict
        self._end = source.size if end is None else end
        self.where = f"{source.path} ({inside})" if inside else str(source.path)

    def __iter__(self) -> Iterator[Member]:
        at, end, long_name, pax = self._start, self._end, b"", dict[str, bytes]()
        while True:
            header = self._read(at, BLOCK)
            if len(header) < BLOCK:
                self._damage(f"cut short: no end mark at byte {at - self._start}")
                return
            if header.count(0) == BLOCK:
                self.is_tar = self.is_tar or at == self._start  # an archive without members
                self._look_behind(at)
                return
            size = _content_size(header)
            if size is None:
                at, long_name, pax = self._next_valid(at), b"", {}
                continue
            self.is_tar = True
            kind, content = header[156:157], at + BLOCK
            if kind in b"123456":  # links, devices, folders and FIFOs have no content, whatever their size field
                size = 0
            elif "size" in pax and kind not in b"LKxg":
                if pax["size"].isdigit() and len(pax["size"]) <= _MAX_DIGITS:
                    size = int(pax["size"])
                else:
                    self._damage(f"damaged: a PAX header before byte {at - self._start} gives no valid size")
            at = content + padded(size)
            if end is not None and content + size > end:
                self._damage(f"cut short: the member at byte {content - self._start} has {size} bytes")
                return
            if kind in b"LKxg":
                if size > _MAX_RECORD:
                    self._damage(f"damaged: a name of {size} bytes at byte {content - self._start}")
                elif kind == b"L":
                    long_name = self._read(content, size).rstrip(b"\0")
                elif kind == b"x":
                    pax, complete = _pax(self._read(content, size))
                    if not complete:
                        self._damage(f"damaged: an unreadable PAX header at byte {content - self._start}")
                continue  # K (a long link name) and g (fields for all members) do not change offsets
            name = pax.get("path") or long_name or _header_name(header)
            sparse = any(field.startswith("GNU.sparse") for field in pax)
            long_name, pax = b"", {}
            what = "file" if kind in _REGULAR else _KINDS.get(kind, "special entry")
            what = "sparse file" if sparse else "folder" if kind in _REGULAR and name.endswith(b"/") else what
            yield Member(_text(name), content, size, what)

    def _read(self, at: int, size: int) -> bytes:
        return self._source.read_at(at, size if self._end is None else max(0, min(size, self._end - at)))

    def _damage(self, what: str) -> None:
        if self._strict:
            raise TarError(f"{self.where}: {what}; get it again")
        self.notes.append(what)

    def _next_valid(self, at: int) -> int:
        """Return the offset of the next valid header after the damaged one at `at`, or the end."""
        if self._strict or self._end is None:
            raise TarError(f"{self.where}: no tar, or damaged at byte {at - self._start}; get it again")
        found = next(self._valid_headers(at + BLOCK, self._end), self._end)
        if self.is_tar or found < self._end:
            self._damage(f"damaged from byte {at} to {found}")
        return found

    def _valid_headers(self, at: int, end: int) -> Iterator[int]:
        for start in range(at, end, _CHUNK):
            chunk = self._read(start, _CHUNK)
            for i in range(0, len(chunk) - BLOCK + 1, BLOCK):
                if chunk[i + 257 : i + 262] == b"ustar" and _content_size(chunk[i : i + BLOCK]) is not None:
                    yield start + i

    def _look_behind(self, at: int) -> None:
        """Note any data after the end mark at `at`, except padding."""
        mark, at = at, at + BLOCK
        while data := self._read(at, _CHUNK):
            if data.count(0) < len(data):
                self.notes.append(f"what follows the end mark at byte {mark - self._start} is not read: joined tars?")
                return
            at += len(data)


def padded(size: int) -> int:
    """Return the number of bytes that a content of `size` bytes occupies in a tar."""
    return -(-size // BLOCK) * BLOCK


def member_at(read: Callable[[int, int], bytes], start: int) -> Member | None:
    """Return the member whose headers begin at `start`, or None. `read` returns bytes by offset and length."""
    with suppress(TarError):
        return next(iter(Walk(Bytes(read), start, strict=True)), None)
    return None


def names(fd: int) -> dict[int, str]:
    """Scan an open tar. Returns the members' names by the offset of their content."""
    source = Bytes(partial(read_at, fd), size=os.fstat(fd).st_size)
    return {member.offset: member.name for member in Walk(source, strict=False)}


def name_before(before: bytes) -> str | None:
    """Return a member's name from the bytes before its content, up to NEAR of them; None if only a scan can tell."""
    header = before[-BLOCK:]
    if len(header) < BLOCK or _content_size(header) is None:
        return None
    name = b"" if header[99] and not header[345] else _header_name(header)  # a full field may be a truncated name
    for start in range(0, len(before) - BLOCK, BLOCK):  # a long name's record ends where the header begins
        record, content = before[start : start + BLOCK], before[start + BLOCK : -BLOCK]
        size = _content_size(record) if record[257:262] == b"ustar" and record[156:157] in b"Lx" else None
        if size and padded(size) == len(content):
            long = content.rstrip(b"\0") if record[156:157] == b"L" else _pax(content[:size])[0].get("path")
            name = long or name
    return _text(name) if name else None


def _pax(text: bytes) -> tuple[dict[str, bytes], bool]:
    """Parse a PAX header. Returns its fields, and whether all of it is valid."""
    fields = dict[str, bytes]()
    while text.strip(b"\0"):
        length = text.partition(b" ")[0]
        if len(length) > _MAX_DIGITS or not length.isdigit() or not len(length) + 1 < int(length) <= len(text):
            return fields, False
        record, text = text[len(length) + 1 : int(length)].rstrip(b"\n"), text[int(length) :]
        field, _, value = record.partition(b"=")
        fields[field.decode("utf-8", "replace")] = value
    return fields, True


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int | None:
    """Parse octal digits, or base 256 if the first bit is set (GNU, 8 GiB and more). Returns None if it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = _OCTAL.fullmatch(field)
    return int(digits[1] or b"0", 8) if digits else None


def _content_size(header: bytes) -> int | None:
    """Return the size in a header, or None if its checksum is wrong: it is damaged or no header."""
    checksum, others = _number(header[148:156]), header[:148] + header[156:]
    total = sum(others) + 8 * 32
    if checksum != total and checksum != total - 256 * sum(byte > 127 for byte in others):  # old tars sum signed bytes
        return None
    return _number(header[124:136])


def _header_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name
