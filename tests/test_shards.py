"""Shards of our sharder and of others as one numbered list of images."""

import errno
import json
import logging
import os
import pickle
import re
import resource
import tarfile
from pathlib import Path

import pytest
from mapimages import image, sample, write_set, write_tar

from pipeline import Loader, recipes
from pipeline.shards import ShardError, ShardSet


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


NAMES = [
    "n01440764_10026",
    "a key with blanks",
    "schlüssel-ä",
    "folder/of/keys/k1",
    "long" * 30,
    "folder/" * 20 + "deep" * 40,
]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar(tmp_path: Path, form: int) -> None:
    names = NAMES[:4] if form == tarfile.USTAR_FORMAT else NAMES
    members = [m for k, name in enumerate(names) for m in sample(name, image(k, 20 + k, 30 + k), k)]
    path = write_tar(tmp_path / "x.tar", members, form)
    found = ShardSet([path])
    assert [found.key(i) for i in range(len(found))] == names
    assert found.table["label"].tolist() == list(range(len(names)))
    with tarfile.open(path) as tar:
        images = [m for m in tar.getmembers() if m.name.endswith(".jpg")]
        assert found.table["offset"].tolist() == [m.offset_data for m in images]
        assert [found.read(i) for i in range(len(found))] == [tar.extractfile(m).read() for m in images]  # type: ignore[union-attr]
    assert found.table[["height", "width"]].tolist() == [(20 + k, 30 + k) for k in range(len(names))]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_key_is_one_read_however_many_images_the_shard_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: int
) -> None:
    names = ["p" * 80 + "/" + "n" * 95, *(NAMES[:4] if form == tarfile.USTAR_FORMAT else NAMES)]
    write_tar(tmp_path / "x.tar", [m for k, name in enumerate(names) for m in sample(name, image(k), k)], form)
    found, reads = ShardSet(tmp_path), []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: reads.append(size) or pread(fd, size, offset))
    assert [found.key(i) for i in range(len(names))] == names
    assert len(reads) == len(names) and max(reads) <= 4096


def test_a_set_says_what_it_is(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "s", count=6, shards=2)
    assert repr(ShardSet(folder)) == f"ShardSet of 6 images in 2 shards: {folder}/map-0000.tar and 1 more"


def test_a_key_that_the_nearest_headers_cannot_tell(tmp_path: Path) -> None:
    names = ["n" * 96, "x", "l" * 5000, "y"]  # cut off at 100 with its extension, or not; a record of 5 kB
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = [(f"{name}.jpg", image(1)) for name in names[: 2 if form == tarfile.USTAR_FORMAT else 4]]
        found = ShardSet(write_tar(tmp_path / f"{form}.tar", members, form))
        assert [found.key(i) for i in range(len(found))] == names[: len(found)]


def test_a_key_without_a_header_is_named_by_its_place(tmp_path: Path) -> None:
    found = ShardSet(write_set(tmp_path, 6, 1))
    at = int(found.table["offset"][3])
    with found.paths[0].open("r+b") as file:
        file.seek(at - 512)
        file.write(b"x" * 512)
    assert found.key(3) == f"byte {at}"
    assert found.key(4) == "image-00004"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_mask_is_its_images_wherever_it_stands(tmp_path: Path, form: int) -> None:
    names = NAMES[:4] if form == tarfile.USTAR_FORMAT else NAMES
    masks = {name: b"mask of " + name.encode() for name in names}
    members = [m for k, name in enumerate(names) for m in ((f"{name}.jpg", image(k)), (f"{name}.seg.png", masks[name]))]
    behind = ShardSet(write_tar(tmp_path / "behind.tar", members, form))
    assert [behind.read_mask(i) for i in range(len(names))] == list(masks.values())
    before = ShardSet(write_tar(tmp_path / "before.tar", members[::-1], form))
    assert [before.read_mask(i) for i in range(len(names))] == list(masks.values())[::-1]
    sparse = [*members[:1], *members[3:4], *members[2:3], *members[4:6], ("other.seg.png", b"no image has it")]
    some = ShardSet(write_tar(tmp_path / "some.tar", sparse, form))
    assert [some.read_mask(i) for i in range(3)] == [None, masks[names[1]], masks[names[2]]]


def test_a_mask_is_found_without_a_walk_where_it_stands_behind_its_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [m for k in range(50) for m in ((f"k{k}.jpg", image(k)), (f"k{k}.seg.png", b"x" * (k + 1)))]
    found, reads = ShardSet(write_tar(tmp_path / "x.tar", members)), []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: reads.append(size) or pread(fd, size, offset))
    assert found.read_mask(49) == b"x" * 50
    assert len(reads) == 3  # the image's name, the mask's header, the mask


def test_directory_pattern_and_list_are_one_set(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "a set", 10, 3)
    pattern = f"{folder}/map-{{0000..0002}}.tar"
    listed = [folder / f"map-000{k}.tar" for k in range(3)]
    sets = [ShardSet(spec) for spec in (folder, str(folder), pattern, listed, f"{folder}/map-000{{0,1,2}}.tar")]
    assert {s.fingerprint for s in sets} == {sets[0].fingerprint}
    assert all(len(s) == 10 for s in sets)
    assert sets[0].first.tolist() == [0, 4, 8, 10]
    assert [sets[0].shard_of(i).name[-5] for i in (0, 3, 4, 9)] == ["0", "0", "1", "2"]
    assert len(ShardSet(f"{folder}/map-{{0001..0002}}.tar")) == 6


def test_labels_from_cls_then_json_then_none(tmp_path: Path) -> None:
    members = [
        ("a.jpg", image(0)),
        ("a.json", b'{"label": 5}'),
        ("a.cls", b"3\n"),
        ("b.json", b'{"label": 5}'),
        ("b.JPEG", image(1)),
        ("c.jpg", image(2)),
        ("d.jpg", image(3)),
        ("d.json", b"[not json"),
        ("e.jpg", image(4)),
        ("e.cls", b"cat"),
        (".hidden.jpg", image(5)),
        ("f.seg.png", image(6, form="PNG")),
        ("g.webp", image(7, form="WEBP")),
    ]
    found = ShardSet(write_tar(tmp_path / "x.tar", members))
    assert dict(zip([found.key(i) for i in range(len(found))], found.table["label"].tolist(), strict=True)) == {
        "a": 3,
        "b": 5,
        "c": -1,
        "d": -1,
        "e": -1,
        "g": -1,
    }


def test_a_label_that_no_table_can_hold_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = {"a": b"2147483647", "b": b"2147483648", "c": b"-9", "d": b"-99999999999"}
    members = [m for k, text in labels.items() for m in ((f"{k}.jpg", image(1)), (f"{k}.cls", text))]
    members += [
        ("e.jpg", image(1)),
        ("e.json", b'{"label": 1e3}'),
        ("f.jpg", image(1)),
        ("f.json", b'{"label": 1234567890123}'),
    ]
    found = ShardSet(write_tar(tmp_path / "x.tar", members))
    assert found.table["label"].tolist() == [2**31 - 1, -1, -9, -1, -1, -1]
    assert "3 labels beyond 32 bits, which are left out, the first is that of 'b'" in warned(caplog)


def test_what_is_wrong_is_said_in_a_sentence(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 4, 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("this is not a tar\n" * 100)
    (tmp_path / "nothing.tar").write_bytes(b"")
    write_tar(tmp_path / "labels.tar", [("a.cls", b"1"), ("a.txt", b"x")])
    write_tar(tmp_path / "void.tar", [])
    cases = {
        str(tmp_path / "none"): "is missing",
        "none": "none is missing",  # below the working directory
        f"{folder}/map-{{0000..0004}}.tar": r"map-0002.tar is missing \(3 of 5 shards\)",
        str(tmp_path / "empty"): "no .tar",
        str(tmp_path / "text.tar"): "is not a tar",
        str(tmp_path / "nothing.tar"): "is empty",
        str(tmp_path / "labels.tar"): "no images",
        str(tmp_path / "void.tar"): "no images",
        "pipe:cat x.tar": "cannot be read image by image",
        "gopher://host/x-{0000..0003}.tar": "cannot be read image by image",
        f"{folder}/map-{{0000-0001}}.tar": "neither a range",
        f"{folder}/map-{{0..99999999}}.tar": "100000000 shards",
        f"{folder}/map-{{0001..0000}}.tar": r"\{0001\.\.0000\} ends before it begins",
        "": "names nothing",
        f"{tmp_path}/{'x' * 300}": "cannot be read",
        str(folder / "map-0000.tar" / "x"): "is missing",
    }
    for spec, sentence in cases.items():
        with pytest.raises(ShardError, match=sentence) as caught:
            ShardSet(spec)
        assert "\n" not in str(caught.value)
    for listed, sentence in (
        ([], "empty list"),
        ([folder / "map-0000.tar"] * 2, "twice"),
        ([folder, folder], "directory"),
    ):
        with pytest.raises(ShardError, match=sentence):
            ShardSet(listed)


def test_splits_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    folder = write_set(tmp_path, 4, 2)
    info = {"name": "x", "splits": {"train": {"name": "train"}, "validation": {"name": "validation"}}}
    (folder / "_info.json").write_text(json.dumps(info))
    with pytest.raises(ShardError, match="train, validation"):
        ShardSet(folder)
    assert len(ShardSet(f"{folder}/map-{{0000..0001}}.tar")) == 4


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickles_are_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    members = [("a.jpg", image(0)), *[(f"a.{e}", trap * 50) for e in ("pyd", "pkl", "pickle", "pth", "npy")]]
    path = write_tar(tmp_path / "x.tar", members)
    with tarfile.open(path) as tar:
        forbidden = [(m.offset_data, m.offset_data + m.size) for m in tar.getmembers()[1:]]
    reads = []
    real = os.pread

    def spy(fd: int, size: int, offset: int) -> bytes:
        reads.append((offset, offset + size))
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", spy)
    found = ShardSet(path)
    found.read(0)
    found.key(0)
    assert not (tmp_path / "sprung").exists()
    assert not [(r, f) for r in reads for f in forbidden if r[0] < f[1] and f[0] < r[1]]


def warned(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)


@pytest.mark.parametrize("where", ["in an image", "in a header", "between members", "in the first block"])
def test_a_shard_cut_off_keeps_what_lies_before(tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str) -> None:
    folder = write_set(tmp_path, 12, 2)
    path = folder / "map-0001.tar"
    with tarfile.open(path) as tar:
        last = [m for m in tar.getmembers() if m.name.endswith("png")][-2]
    cut = {
        "in an image": last.offset_data + last.size // 2,
        "in a header": last.offset + 100,
        "between members": last.offset,
        "in the first block": 300,
    }[where]
    os.truncate(path, cut)
    found = ShardSet(folder)
    assert len(found) == (6 if where == "in the first block" else 10)
    assert "map-0001.tar" in warned(caplog)
    assert "map-0000.tar" not in warned(caplog)
    caplog.clear()
    ShardSet(folder)  # named at every start, not only when it is first met
    assert "map-0001.tar" in warned(caplog)


def test_a_damaged_header_costs_one_member(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_set(tmp_path, 8, 1)
    path = folder / "map-0000.tar"
    with tarfile.open(path) as tar:
        third = tar.getmember("image-00002.png")
    content = bytearray(path.read_bytes())
    content[third.offset + 10] ^= 4
    path.write_bytes(content)
    found = ShardSet(folder)
    assert [found.key(i) for i in range(len(found))] == [f"image-0000{k}" for k in (0, 1, 3, 4, 5, 6, 7)]
    assert f"damaged from byte {third.offset}" in warned(caplog)


def test_what_follows_the_end_mark_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two tars in one file: as every reader of tars does, only the first is read, but not without a word."""
    one, other = (write_tar(tmp_path / f"{k}.tar", sample(f"k{k}", image(k), k)) for k in range(2))
    joined = tmp_path / "joined.tar"
    joined.write_bytes(one.read_bytes() + other.read_bytes())
    assert len(ShardSet(joined)) == 1
    assert re.search(r"joined\.tar: what follows the end mark at byte \d+ is not read", warned(caplog))
    caplog.clear()
    assert len(ShardSet(one)) == 1  # whose end is padded with zeros
    assert not warned(caplog)


@pytest.mark.parametrize("length", [b"-0000001", b"-0002000", b"zzzzzzzz", b"1" * 8 + b"9"])
def test_a_length_that_cannot_be_costs_one_member(tmp_path: Path, length: bytes) -> None:
    """With its checksum right: an archive made to hurt. A negative length would send the walk round for ever."""
    path = write_tar(tmp_path / "x.tar", [("a.jpg", image(0)), ("b.jpg", image(1))])
    content = bytearray(path.read_bytes())
    content[124:136] = length.ljust(12, b"\0")
    content[148:156] = b"%06o\0 " % (sum(content[:512]) - sum(content[148:156]) + 8 * 32)
    path.write_bytes(content)
    found = ShardSet(path)
    assert [found.key(i) for i in range(len(found))] == ["b"]


@pytest.mark.parametrize("size", ["²", "9" * 5000, "-5", "1e3", "9" * 30])
def test_a_pax_length_that_cannot_be_is_not_believed(tmp_path: Path, size: str) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", image(0)), ("b.jpg", image(1))])
    record = f"size={size}\n".encode()
    record = b"%d %s" % (len(record) + 1 + len(str(len(record) + 5)), record)
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    path.write_bytes(
        header.tobuf(tarfile.USTAR_FORMAT) + record.ljust(-(-len(record) // 512) * 512, b"\0") + path.read_bytes()
    )
    assert [row["size"] for row in ShardSet(path).table] == [len(image(0)), len(image(1))]


def test_a_pipe_among_the_shards_is_not_opened(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 4, 2)
    odd = folder / "odd.tar"
    for make, unmake in (
        (lambda: os.mkfifo(odd), odd.unlink),
        (odd.mkdir, odd.rmdir),
        (lambda: odd.symlink_to("/nowhere"), odd.unlink),
    ):
        make()
        with pytest.raises(ShardError, match=r"odd\.tar is a broken link or no regular file"):
            ShardSet(folder)
        unmake()
    assert len(ShardSet(folder)) == 4


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_shard_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    folder, pread = write_set(tmp_path / "set", 4, 2), os.pread

    def refuse(fd: int, size: int, offset: int) -> bytes:
        if Path(f"/proc/self/fd/{fd}").resolve().name == "map-0001.tar":
            raise OSError(number, os.strerror(number))
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", refuse)
    with pytest.raises(ShardError, match=rf"map-0001\.tar cannot be read \({os.strerror(number)}\)"):
        ShardSet(folder)


def test_a_listed_part_of_a_set_is_a_set(tmp_path: Path) -> None:
    whole = ShardSet(write_set(tmp_path / "set", 24, 3))
    chosen = ShardSet(tmp_path / "set").only(["image-00017.JPEG", "image-00003", "image-00004.jpg", "image-00003"])
    assert [chosen.key(i) for i in range(len(chosen))] == ["image-00003", "image-00004", "image-00017"]
    assert chosen.first.tolist() == [0, 2, 2, 3]  # the second shard is empty
    assert [chosen.read(i) for i in range(3)] == [whole.read(i) for i in (3, 4, 17)]
    assert chosen.table["label"].tolist() == [3, 4, 3]
    assert len({whole.fingerprint, chosen.fingerprint, whole.only(["image-00003"]).fingerprint}) == 3
    assert chosen.fingerprint == whole.only(["image-00004", "image-00017", "image-00003"]).fingerprint
    again = pickle.loads(pickle.dumps(chosen))
    assert [again.key(i) for i in range(3)] == [chosen.key(i) for i in range(3)]
    assert again.fingerprint == chosen.fingerprint
    for order in ("global", "block"):
        loader = Loader(chosen, recipes.plain(size=16), 3, order=order, num_threads=1)  # type: ignore[arg-type]
        assert sorted(next(iter(loader)).index.tolist()) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"no image 'image-00099'; 1 of the 2 names listed are absent"):
        whole.only(["image-00099", "image-00001"])
    with pytest.raises(ValueError, match=r"no image of .* is listed"):
        whole.only([])
    for names in ("image-00003", [3]):
        with pytest.raises(ValueError, match="must be a list of strings"):
            whole.only(names)  # type: ignore[arg-type, list-item]


def test_a_list_of_names_tells_folders_apart_where_it_must(tmp_path: Path) -> None:
    members = [m for k, folder in enumerate("ab") for m in sample(f"{folder}/001", image(k), k)]
    whole = ShardSet(write_tar(tmp_path / "x.tar", members))
    assert whole.only(["b/001"]).table["label"].tolist() == [1]
    with pytest.raises(ValueError, match="two images '001'"):
        whole.only(["001"])


def test_a_set_travels_to_other_processes(tmp_path: Path) -> None:
    found = ShardSet(write_set(tmp_path / "set", 6, 2))
    carried = pickle.dumps(found)
    assert len(carried) < 2000  # not the table
    again = pickle.loads(carried)
    assert again.fingerprint == found.fingerprint
    assert again.read(5) == found.read(5)


def test_members_that_do_not_belong_together_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [*sample("a", image(0), 1), ("b.cls", b"2"), *sample("c", image(1), 3), ("a.jpg", image(2))]
    found = ShardSet(write_tar(tmp_path / "x.tar", members))
    assert found.table["label"].tolist() == [1, 3]
    assert found.read(0) == image(0)
    assert "'b'" in warned(caplog)
    assert "second image" in warned(caplog)


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    for k in range(80):
        write_tar(tmp_path / f"{k:03d}.tar", sample(f"k{k}", image(k), k))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, hard))
    try:
        found = ShardSet(tmp_path)
        found._files._most = 16
        for _ in range(2):
            assert [found.read(i) for i in range(80)] == [image(i) for i in range(80)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_shard_cut_off_while_open_gives_fewer_bytes(tmp_path: Path) -> None:
    folder = write_set(tmp_path, 6, 1)
    found = ShardSet(folder)
    whole = found.read(3)
    os.truncate(folder / "map-0000.tar", int(found.table["offset"][3]) + 10)
    assert found.read(3) == whole[:10]
    assert found.read(5) == b""
