"""Tars as sources: hostile, cut short, damaged, or several in one file."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
import sharder_sources as make
from sharding import SourceError, sources

from pipeline import tar


@pytest.fixture(scope="module")
def photos():
    return make.photographs(6)


def hostile_tar():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:

        def add(name, content=b"", **fields):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            for field, value in fields.items():
                setattr(entry, field, value)
            tar.addfile(entry, io.BytesIO(content))

        add("cat/good.jpg", make.encode(1))
        add("../../cat/escaped.jpg", make.encode(2))
        add("/tmp/sharder-was-here.jpg", make.encode(3))
        add("cat/link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("cat/hard.jpg", type=tarfile.LNKTYPE, linkname="cat/good.jpg")
        add("cat/pipe.jpg", type=tarfile.FIFOTYPE)
        add("cat/disk.jpg", type=tarfile.BLKTYPE, devmajor=8)
        add("cat/tty.jpg", type=tarfile.CHRTYPE, devmajor=5)
        add("cat/evil.pkl", b"cos\nsystem\n(S'touch /tmp/sharder-was-here'\ntR.")
        add("dog/also good.jpg", make.encode(4))
    return out.getvalue()


@pytest.mark.parametrize("packed", [False, True])
def test_hostile_entries_are_neither_followed_nor_created(packed, tmp_path):
    raw = hostile_tar()
    source = make.file(tmp_path / "in" / "x.tar", gzip.compress(raw) if packed else raw)
    before = set(tmp_path.rglob("*"))
    assert make.run(source, tmp_path / "out") == 0
    outside = {path for path in set(tmp_path.rglob("*")) - before if tmp_path / "out" not in (path, *path.parents)}
    assert not outside
    found = make.samples(tmp_path / "out")
    assert sorted(parts["jpg"] for parts in found.values()) == sorted([make.encode(1), make.encode(4)])
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {line["source"]: line["reason"] for line in lines}
    assert reasons["cat/link.jpg"] == "symbolic link in a tar"
    assert reasons["cat/pipe.jpg"] == "FIFO in a tar"
    assert "unsafe" in reasons["../../cat/escaped.jpg"]
    assert "unsafe" in reasons["/tmp/sharder-was-here.jpg"]
    assert len(reasons) == 7
    assert make.run("--check", tmp_path / "out") == 0


def test_a_tar_cut_anywhere_is_refused_before_work(photos, tmp_path):
    few = {name: content for name, content in photos.items() if name.endswith("_0.JPEG")}
    whole = make.tar_of(make.class_tars(few))
    end = len(whole.rstrip(b"\0"))
    for cut in [*range(0, end + 1024, 1536), end - 1, 511, 513]:
        path = make.file(tmp_path / "in.tar", whole[:cut])
        with pytest.raises(SourceError, match=r"cut short|no tar"):
            list_all(path)
    packed = gzip.compress(whole)
    for cut in (len(packed) // 2, len(packed) - 4):
        with pytest.raises(SourceError):
            list_all(make.file(tmp_path / "in.tar.gz", packed[:cut]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("members", [1, 2])
def test_what_follows_the_end_mark_is_noted(packed, members, photos, tmp_path, capsys):
    """Two tars in one file, and two gzip members in one file: a reader of tars sees the first alone."""
    names = list(photos)
    parts = [make.tar_of({name: photos[name]}) for name in (names[0], names[-1])[:members]]
    source = make.file(tmp_path / "x.tar", b"".join(gzip.compress(part) if packed else part for part in parts))
    assert make.run(source, tmp_path / "out") == 0
    assert len(make.samples(tmp_path / "out")) == 1
    said = capsys.readouterr().out
    assert ("follows the end mark" in said) == (members == 2)
    inner = make.file(tmp_path / "outer.tar", make.tar_of({"n01440764.tar": b"".join(parts)}))
    assert make.run(inner, tmp_path / "out of tars") == 0
    said = capsys.readouterr().out
    assert ("(n01440764.tar): what follows the end mark" in said) == (members == 2)


def list_all(path):
    sources.read(sources.Request(path), print)


def test_flipped_bits_never_lead_outside_or_hang(photos, tmp_path):
    """Whatever a damaged header says: a sentence, or members that lie within the file."""
    whole = bytearray(make.tar_of(make.class_tars(dict(list(photos.items())[:4])), tarfile.PAX_FORMAT))
    random = np.random.default_rng(0)
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    refused = [0, 0]
    for trial in range(400):
        broken, start = bytearray(whole), int(random.choice(headers))
        broken[start + int(random.integers(148 if trial % 2 else 512))] ^= 1 << int(random.integers(8))
        if trial % 2:  # a header that lies with its checksum right
            broken[start + 148 : start + 156] = b" " * 8
            broken[start + 148 : start + 156] = b"%06o\0 " % sum(broken[start : start + 512])
        path = make.file(tmp_path / "in.tar", bytes(broken))
        try:
            listing = sources.read(sources.Request(path, unlabelled=True), print)
        except SourceError:
            refused[trial % 2] += 1
            continue
        assert all(start + size <= len(whole) for start, size in listing.table[["offset", "size"]].tolist())
    assert refused[0] > 150, "a header has a checksum"
    assert 5 < refused[1] < 195


def test_sizes_beyond_octal_are_read_and_must_fit():
    header = bytearray(make.tar_of({"a": b""})[:512])
    header[124:136] = b"\x80" + (9 << 30).to_bytes(11, "big")
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)

    class Huge:
        path, size = "huge.tar", 10 << 30

        @staticmethod
        def read_at(offset, size):
            return bytes(header) if offset == 0 else bytes(size)

    (member,) = tar.Walk(Huge, strict=True)
    assert member.size == 9 << 30
    Huge.size = 1 << 30
    with pytest.raises(tar.TarError, match="cut short"):
        list(tar.Walk(Huge, strict=True))
