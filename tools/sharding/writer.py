"""Writes samples as a USTAR file, its DALI index and its table. The bytes depend only on the samples."""

import hashlib
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from pipeline.shards import SAMPLE
from pipeline.tar import BLOCK

MTIME = 1_000_000_000  # any constant; 0 makes GNU tar warn on every member


@dataclass(frozen=True)
class Sample:
    """One sample of a shard."""

    key: str  # ASCII without blanks or dots, short enough for USTAR (plan.clean_key)
    members: tuple[tuple[str, bytes], ...]  # (extension, content), the image first
    height: int  # of the image, pixels
    width: int
    label: int = -1
    repairs: tuple[str, ...] = ()  # changes to the image; counted in the manifest
    notes: tuple[str, ...] = ()  # peculiarities of the image; counted in the manifest
    sums: Mapping[str, int] = field(default_factory=dict)  # numbers to add up over the split, for its manifest


@dataclass(frozen=True)
class Quarantined:
    """A sample that is left out, with the reason."""

    key: str
    reason: str
    source: str


class ShardWriter:
    """Writes one shard, and collects the contents of its index, its table and its record."""

    def __init__(self) -> None:
        self.bytes = self.repaired = 0
        self.quarantined: list[dict[str, str]] = []
        self.counts: Counter[str] = Counter()  # of repairs and notes
        self.sums: Counter[str] = Counter()
        self._hash = hashlib.sha256()
        self._index: list[str] = []
        self._rows: list[tuple[int, int, int, int, int, int]] = []

    def write(self, file: BinaryIO, samples: Iterable[Sample | Quarantined]) -> None:
        for sample in samples:
            if isinstance(sample, Quarantined):
                self.quarantined.append({"key": sample.key, "reason": sample.reason, "source": sample.source})
                continue
            self._add(file, sample)
            self.repaired += bool(sample.repairs)
            self.counts.update((*sample.repairs, *sample.notes))
            self.sums.update(sample.sums)
        self._write(file, bytes(2 * BLOCK))  # the end mark

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    @property
    def table(self) -> np.ndarray:
        """The table, (samples,) of SAMPLE, in the order written."""
        return np.array(self._rows, dtype=SAMPLE)

    @property
    def index(self) -> bytes:
        return index_bytes(self._index)

    def _add(self, file: BinaryIO, sample: Sample) -> None:
        entries = []
        for extension, content in sample.members:
            name = f"{sample.key}.{extension}"
            entries.append((extension, self.bytes + BLOCK, len(content), name))
            self._write(file, b"".join((_header(name, len(content)), content, bytes(-len(content) % BLOCK))))
        _, offset, size, _ = entries[0]
        self._index.append(index_line(entries))
        self._rows.append((0, offset, size, sample.height, sample.width, sample.label))

    def _write(self, file: BinaryIO, data: bytes) -> None:
        self._hash.update(data)
        file.write(data)
        self.bytes += len(data)


def _header(name: str, size: int) -> bytes:
    """Return a USTAR header with constant owner and time."""
    mode, nobody, no_device, checksum = b"0000444\0", b"0000000\0", b"0000000\0", b" " * 8
    numbers = (mode, nobody, nobody, b"%011o\0" % size, b"%011o\0" % MTIME, checksum)
    fields = (name.encode("ascii"), *numbers, b"0", b"", b"ustar\0", b"00", b"", b"", no_device, no_device)
    block = bytearray(struct.pack("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s167x", *fields))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def index_line(entries: list[tuple[str, int, int, str]]) -> str:
    """Return a sample's line in DALI's index; `entries` are (extension, offset of the content, size, name)."""
    return " ".join(f"{extension} {offset} {size} {name}" for extension, offset, size, name in entries)


def index_bytes(lines: list[str]) -> bytes:
    """Return DALI's index, version 1.2."""
    return "".join(f"{line}\n" for line in [f"v1.2 {len(lines)}", *lines]).encode("utf-8", "surrogateescape")
