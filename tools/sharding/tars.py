"""Tars by offset: a walk that reads headers only, and a writer whose bytes depend on nothing but its input.

Payloads are never extracted to a path: a member is (name, offset, size) and its bytes are read from there. So a link, a
device or `../../x` in a hostile tar is a row in a list, never a file.
"""

import gzip
import hashlib
import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from . import SourceError

BLOCK = 512
MTIME = 1_000_000_000  # any constant; 0 makes GNU tar warn on every member
# One row per image of a tar: where its bytes are, how large it is, its class. The loader maps this table.
SAMPLE = np.dtype(
    [("shard", "<i4"), ("offset", "<i8"), ("size", "<i4"), ("height", "<i4"), ("width", "<i4"), ("label", "<i4")]
)
_KINDS = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"5": "folder",
    b"6": "FIFO",
    b"S": "sparse file",
}
_MAX_NAME = 1 << 20  # of a GNU long name or a PAX header: more is an attack, not a name


@dataclass(frozen=True)
class Member:
    """One entry of a tar. `kind` is "file" or what it is instead."""

    name: str
    offset: int  # first byte of its content
    size: int
    kind: str


class Seekable:
    """Bytes of a plain file by offset."""

    def __init__(self, path: Path):
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size

    def read_at(self, offset: int, size: int) -> bytes:
        data = os.pread(self._fd, size, offset)
        while 0 < len(data) < size:  # a signal, a network disk or 2 GiB at once cut a read short
            more = os.pread(self._fd, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def close(self) -> None:
        os.close(self._fd)


class Gzipped:
    """The content of a gzip file by offset, forwards only: what lies between two reads is decompressed and dropped."""

    size = None  # known only at the end

    def __init__(self, path: Path):
        self.path = path
        self._file = gzip.open(path, "rb")  # noqa: SIM115 - closed by close()
        self._at = 0

    def read_at(self, offset: int, size: int) -> bytes:
        if offset < self._at:
            raise ValueError(f"{self.path}: cannot go back from {self._at} to {offset} in a gzip file")
        try:
            while self._at < offset:
                dropped = len(self._file.read(min(1 << 20, offset - self._at)))
                if not dropped:
                    return b""
                self._at += dropped
            data = self._file.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise SourceError(f"{self.path} is no sound gzip file ({error}): download it again") from None
        self._at += len(data)
        return data

    def finish(self) -> None:
        """Read to the end: gzip's checksum comes last."""
        while self.read_at(self._at, 1 << 20):
            pass

    def close(self) -> None:
        self._file.close()


def open_bytes(path: Path) -> Seekable | Gzipped:
    """Compressed or not, by its first bytes."""
    with path.open("rb") as file:
        return Gzipped(path) if file.read(2) == b"\x1f\x8b" else Seekable(path)


def walk(source: Seekable | Gzipped, start: int = 0, end: int | None = None, *, inside: str = "") -> Iterator[Member]:
    """Every member between two offsets, in order, by its headers alone (one 512-byte read per member).

    Reads USTAR, GNU long names and PAX paths and sizes. Raises SourceError where the tar is damaged or cut short: a
    tar must end in a block of zeros, so even a cut exactly between two members is seen.
    """
    where = f"{source.path}{f' ({inside})' if inside else ''}"
    end = source.size if end is None else end
    pax: dict = {}
    at, long_name = start, None
    while True:
        header = source.read_at(at, BLOCK) if end is None or at + BLOCK <= end else b""
        if len(header) < BLOCK:
            raise SourceError(f"{where} is cut short: it ends at byte {at - start} without an end mark; get it again")
        if not any(header):
            return
        if not _checksum_holds(header):
            raise SourceError(f"{where} is no tar, or damaged: wrong header checksum at byte {at - start}")
        size, kind = _number(header[124:136], where), header[156:157]
        if kind in b"123456":  # links, devices, folders and FIFOs have no content, whatever they say
            size = 0
        if kind not in (b"L", b"K", b"x", b"g"):
            size = int(pax.get("size", size))
        content = at + BLOCK
        if kind == b"S" and header[482]:  # an old GNU sparse file: its map goes on in further blocks
            while any(source.read_at(content, BLOCK)[504:505]):
                content += BLOCK
            content += BLOCK
        at = content + -(-size // BLOCK) * BLOCK
        if size < 0 or (end is not None and content + size > end):
            raise SourceError(f"{where} is cut short: a member at byte {content - start} wants {size} bytes")
        if kind in (b"L", b"K", b"x", b"g"):
            if size > _MAX_NAME:
                raise SourceError(f"{where} is damaged: a name of {size} bytes at byte {content - start}")
            text = source.read_at(content, size)
            if kind == b"L":
                long_name = text.rstrip(b"\0")
            elif kind == b"x":
                pax = _pax(text, where)
            continue
        name = header[:100].split(b"\0", 1)[0]
        if header[257:263] == b"ustar\0" and header[345:346] != b"\0":
            name = header[345:500].split(b"\0", 1)[0] + b"/" + name
        name = pax.get("path", b"") or long_name or name
        sparse = any(field.startswith("GNU.sparse") for field in pax)
        what = "sparse file" if sparse else "file" if kind in (b"0", b"\0", b"7") else _KINDS.get(kind, "special entry")
        long_name, pax = None, {}
        yield Member(name.decode("utf-8", "surrogateescape"), content, size, what)


def _octal(field: bytes) -> bool:
    text = field.strip(b"\0 ")
    return bool(text) and all(48 <= digit < 56 for digit in text)


def _checksum_holds(header: bytes) -> bool:
    """As unsigned bytes, or as signed ones: some old writers summed those."""
    field = header[148:156]
    if not _octal(field):
        return False
    others = header[:148] + header[156:]
    unsigned = sum(others) + 8 * 32
    return int(field.strip(b"\0 "), 8) in (unsigned, unsigned - 256 * sum(byte > 127 for byte in others))


def _number(field: bytes, where: str) -> int:
    if field[0] & 0x80:  # GNU base 256, for sizes of 8 GiB and more: the train tar's class tars do not need it, 21k may
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    if not field.strip(b"\0 "):
        return 0
    if not _octal(field):
        raise SourceError(f"{where} is no tar, or damaged: {field!r} is no size")
    return int(field.strip(b"\0 "), 8)


def _pax(text: bytes, where: str) -> dict:
    """`path` (bytes) and `size` of a PAX header, and the names of its other fields."""
    fields: dict = {}
    while text.strip(b"\0"):
        length, _, rest = text.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(text) or b"=" not in rest:
            raise SourceError(f"{where} is damaged: unreadable PAX header")
        record, text = text[len(length) + 1 : int(length)].rstrip(b"\n"), text[int(length) :]
        field, _, value = record.partition(b"=")
        fields[field.decode("utf-8", "replace")] = value
    if "size" in fields and not fields["size"].isdigit():
        raise SourceError(f"{where} is damaged: PAX size {fields['size']!r}")
    return fields


class ShardWriter:
    """Writes samples to a USTAR file and remembers what its index and table say."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._hash = hashlib.sha256()
        self.bytes = 0
        self.index: list[str] = []
        self.rows: list[tuple[int, int, int, int, int, int]] = []

    def add(self, key: str, jpeg: bytes, label: int, json: bytes, height: int, width: int) -> None:
        """One sample. The key is ASCII without blanks or dots and short enough for USTAR (plan.clean_key)."""
        parts, image_at = [], 0
        for extension, content in (("jpg", jpeg), ("cls", str(label).encode()), ("json", json)):
            name = f"{key}.{extension}"
            self._write(_header(name, len(content)))
            image_at = image_at or self.bytes
            parts.append(f"{extension} {self.bytes} {len(content)} {name}")
            self._write(content)
            self._write(bytes(-len(content) % BLOCK))
        self.index.append(" ".join(parts))
        self.rows.append((0, image_at, len(jpeg), height, width, label))

    def finish(self) -> str:
        """The end mark; returns the sha256 of all that was written."""
        self._write(bytes(2 * BLOCK))
        return self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(data)
        self.bytes += len(data)


def _header(name: str, size: int) -> bytes:
    """A USTAR header that says nothing about who wrote it, or when."""
    no_device = b"0000000\0"
    who = (b"0000444\0", b"0000000\0", b"0000000\0")  # mode, user, group
    what = (
        b"%011o\0" % size,
        b"%011o\0" % MTIME,
        b" " * 8,
        b"0",
        b"",
        b"ustar\0",
        b"00",
        b"",
        b"",
        no_device,
        no_device,
    )
    block = bytearray(struct.pack("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s167x", name.encode("ascii"), *who, *what))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def index_text(index: list[str]) -> str:
    """DALI's index, version 1.2: offsets are those of the content, not of the header."""
    return "".join(f"{line}\n" for line in [f"v1.2 {len(index)}", *index])


def table(rows: list[tuple[int, int, int, int, int, int]]) -> np.ndarray:
    """(samples,) of SAMPLE; its bytes in a file depend on the rows alone."""
    return np.array(rows, dtype=SAMPLE)


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
