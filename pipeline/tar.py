"""Where the members of a tar lie, without reading their contents.

A walk of our own over USTAR, GNU and PAX archives: the ready-made ones stop at the first damaged header, trust index
files that may be stale, or read PAX archives wrongly. Nothing is ever extracted, and links, devices and pickles are
never opened.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

BLOCK = 512
_REGULAR = b"0\0" + b"7"
_MAX_NAME = 1 << 16  # a longer GNU or PAX name record is damage
NEAR = 4096  # bytes before a member's content in which its name stands, as a rule
_MAX_DIGITS = 19  # of a number in a PAX record; Python refuses to read very long ones


@dataclass
class Damage:
    """What a walk met on its way; empty when the archive is whole."""

    notes: list[str] = field(default_factory=list)
    is_tar: bool = False


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    offset: int  # of its first byte in the archive
    size: int


def _number(text: bytes) -> int:
    """A tar header's number: octal digits, or base 256 where the first bit is set."""
    if text[0] & 0x80:
        return int.from_bytes(bytes([text[0] & 0x7F]) + text[1:], "big")
    digits = text.split(b"\0", 1)[0].strip()
    return int(digits, 8) if digits else 0


def _sound(header: bytes) -> bool:
    if len(header) < BLOCK:
        return False
    try:
        stored, length = _number(header[148:156]), _number(header[124:136])
    except ValueError:
        return False
    return length >= 0 and stored == sum(header) - sum(header[148:156]) + 8 * 32


def _pax(record: bytes) -> dict[str, str]:
    fields = {}
    while record:
        length = record.partition(b" ")[0]
        if not length.isdigit() or len(length) > _MAX_DIGITS or int(length) <= len(length) + 1:
            break
        keyword, _, value = record[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[keyword.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        record = record[int(length) :]
    return fields


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0].decode("utf-8", "replace")
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0].decode("utf-8", "replace") + "/" + name
    return name


def name_at(fd: int, offset: int) -> str | None:
    """The name of the member whose content starts at `offset`, by one read of what precedes it; None: walk to know."""
    return name_before(os.pread(fd, min(NEAR, offset), max(0, offset - NEAR)))


def name_before(before: bytes) -> str | None:
    """Likewise, from the bytes that precede the content, up to NEAR of them."""
    header = before[-BLOCK:]
    if not _sound(header):
        return None
    for start in range(0, len(before) - BLOCK, BLOCK):  # a long name's record ends where the header begins
        record = before[start : start + BLOCK]
        if record[257:262] == b"ustar" and record[156:157] in b"Lx" and _sound(record):
            length, content = _number(record[124:136]), before[start + BLOCK : -BLOCK]
            if -(-length // BLOCK) * BLOCK == len(content):
                long = content.rstrip(b"\0").decode("utf-8", "replace") if record[156:157] == b"L" else ""
                name = long or _pax(content[:length]).get("path")
                if name:
                    return name
    cut_off = header[99] and not header[345]  # perhaps, with a record further back
    return None if cut_off else _name(header)


def _next_header(fd: int, position: int, size: int) -> int:
    """The next sound header of this archive at or behind `position`; `size` where there is none."""
    while position < size:
        chunk = os.pread(fd, 1 << 20, position)
        for i in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk[i + 257 : i + 262] == b"ustar" and _sound(chunk[i : i + BLOCK]):
                return position + i
        position += 1 << 20
    return size


def walk(fd: int, damage: Damage) -> Iterator[Member]:
    """The regular members of the archive open as `fd`, in order; what is wrong with it is noted in `damage`.

    A damaged header costs its member only: the walk goes on at the next sound one. A member whose content reaches
    beyond the end of the file is left out.
    """
    size, position = os.fstat(fd).st_size, 0
    long_name, pax = "", dict[str, str]()
    while position + BLOCK <= size:
        header = os.pread(fd, BLOCK, position)
        if not header.rstrip(b"\0"):
            damage.is_tar = damage.is_tar or position == 0  # two empty blocks are an archive without members
            return
        if not _sound(header):
            found = _next_header(fd, position + BLOCK, size)
            if damage.is_tar or found < size:
                damage.notes.append(f"damaged from byte {position} to {found}")
            position, long_name, pax = found, "", {}
            continue
        damage.is_tar = True
        kind, start, length = header[156:157], position + BLOCK, _number(header[124:136])
        if kind in (b"0", b"\0", b"7") and "size" in pax:
            sound = pax["size"].isdecimal() and len(pax["size"]) <= _MAX_DIGITS
            length = int(pax["size"]) if sound else length
        position = start + -(-length // BLOCK) * BLOCK
        if start + length > size:
            damage.notes.append(f"cut off at byte {size}")
            return
        if kind in b"Lx" and length <= _MAX_NAME:
            record = os.pread(fd, length, start)
            if kind == b"L":
                long_name = record.rstrip(b"\0").decode("utf-8", "replace")
            else:
                pax = _pax(record)
            continue
        if kind in b"Kg":  # a long link name, or fields for all members: neither moves a member
            continue
        name = pax.get("path") or long_name or _name(header)
        long_name, pax = "", {}
        if kind in (b"0", b"\0", b"7") and not name.endswith("/"):
            yield Member(name, start, length)
    damage.notes.append(f"no end mark at byte {size}: perhaps cut off")
