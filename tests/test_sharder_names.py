"""Names of samples and classes: unique keys that every reader accepts, and names that must be refused."""

import json
import os
import tarfile

import pytest
import sharder_sources as make
from sharding import labels, sources


def test_odd_names_become_clean_keys_and_are_kept_in_the_json(tmp_path):
    odd = ["with blank.jpg", "café.jpg", "two.dots.jpg", "x" * 180 + ".jpg", "日本.JPEG", os.fsdecode(b"raw\xff.jpg")]
    source = make.tree(tmp_path / "in", {f"one/{name}": make.encode(place) for place, name in enumerate(odd)})
    assert make.run(source, tmp_path / "out") == 0
    found = make.samples(tmp_path / "out")
    assert len(found) == len(odd)
    for key, parts in found.items():
        assert key.isascii()
        assert not set(key) & set(" ./\\")
        assert len(key) <= 95
        assert list(parts) == ["jpg", "cls", "json"]
    said = {json.loads(parts["json"])["filename"] for parts in found.values()}
    assert set(odd[:5]) < said
    assert make.run("--check", tmp_path / "out") == 0


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_tars_are_read(form, tmp_path):
    names = ["a/" + "y" * 150 + ".jpg", "a/üñí cøde.jpg", "a/" + "deep/" * 40 + "z.jpg"]
    source = make.file(tmp_path / "in.tar", make.tar_of({name: make.encode(i) for i, name in enumerate(names)}, form))
    listing = sources.read(sources.Request(source, unlabelled=True), print)
    assert [listing.name(row) for row in range(3)] == names
    assert make.run(source, tmp_path / "out", "--unlabelled") == 0
    assert len(make.samples(tmp_path / "out")) == 3


def test_duplicate_keys_name_both(tmp_path, capsys):
    source = make.tree(
        tmp_path / "in", {"a/1.jpg": make.encode(1), "b/1.jpg": make.encode(2), "b/2.jpg": make.encode(3)}
    )
    assert make.run(source, tmp_path / "out", "--key", "stem") == 2
    said = capsys.readouterr().err
    assert "a/1.jpg" in said
    assert "b/1.jpg" in said
    assert not (tmp_path / "out").exists()
    assert make.run(source, tmp_path / "out", "--key", "path") == 0
    assert set(make.samples(tmp_path / "out")) == {"a_1", "b_1", "b_2"}


def test_names_that_repeat_become_paths_but_in_a_release(tmp_path, capsys, monkeypatch):
    """As Caltech-101 has them. A release's names are unique: there it is one image that lies in two classes."""
    files = {f"n0000000{c}/{name}.jpg": make.encode(c) for c, names in ((1, "1"), (2, "12")) for name in names}
    source = make.tree(tmp_path / "in", files)
    assert make.run(source, tmp_path / "out") == 0
    assert set(make.samples(tmp_path / "out")) == {"n00000001_1", "n00000002_1", "n00000002_2"}
    assert "a sample's key is made of its path" in capsys.readouterr().out
    assert make.run(source, tmp_path / "out", "--key", "path") == 0  # the same set: nothing is made again
    assert make.run("--check", tmp_path / "out") == 0
    monkeypatch.setitem(labels.RELEASES, 2, ("two synsets", "two"))
    assert make.run(source, tmp_path / "other") == 2
    assert "1 duplicate key(s): '1'" in capsys.readouterr().err


def test_a_class_folder_with_a_latin1_name_is_kept_as_it_is(tmp_path):
    name = os.fsdecode("café".encode("latin-1"))
    files = {f"{name}/1.jpg": make.encode(1), "dog/2.jpg": make.encode(2)}
    for source in (make.tree(tmp_path / "in", files), make.file(tmp_path / "in.tar", make.tar_of(files))):
        out = tmp_path / f"out of {source.name}"
        assert make.run(source, out) == 0
        assert (out / "synsets.txt").read_bytes() == b"caf\xe9\ndog\n"
        assert make.run("--check", out) == 0
    again = ("--split", "val", "--classes", out / "synsets.txt")
    assert make.run(tmp_path / "in", tmp_path / "again", *again) == 0  # as a second split of the same classes is made


@pytest.mark.parametrize("name", ["two\nlines", "two\u2028lines", "two\rlines", "two\x85lines"])
def test_a_class_name_of_several_lines_is_refused(name, tmp_path, capsys):
    source = make.tree(tmp_path / "in", {f"{name}/1.jpg": make.encode(1), "dog/2.jpg": make.encode(2)})
    assert make.run(source, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert repr(name) in said
    assert len(said.splitlines()) == 1
