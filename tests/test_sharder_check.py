"""--check detects every kind of damage, and our tar parser reads our own tars without notes."""

import concurrent.futures
import json
import shutil

import numpy as np
import pytest
import sharder_sources as make

from pipeline import tar


def patched(path, change):
    raw = bytearray(path.read_bytes())
    path.chmod(0o644)
    path.write_bytes(bytes(change(raw) or raw))


def flip(at):
    def change(raw):
        raw[at] ^= 1

    return change


def rewrite(out, change):
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))


def other_label(raw):
    """A label beyond the classes, in the tar alone."""
    at = raw.index(b".cls\0")
    content = at // 512 * 512 + 512
    raw[content : content + 1] = b"9"


DAMAGES = {
    "a flipped bit": (lambda out: patched(out / "tiny-train-0001.tar", flip(700)), "0001.tar: sha256"),
    "a cut tar": (lambda out: patched(out / "tiny-train-0001.tar", lambda raw: raw[:-700]), "0001.tar"),
    "a cut at a block": (lambda out: patched(out / "tiny-train-0001.tar", lambda raw: raw[:-1024]), "cut short"),
    "an empty tar": (lambda out: patched(out / "tiny-train-0001.tar", lambda raw: raw[:0] or b"\0"), "0001.tar"),
    "classes in another order": (
        lambda out: patched(out / "synsets.txt", lambda raw: b"\n".join(raw.split()[::-1]) + b"\n"),
        "synsets.txt says",
    ),
    "no quarantine list": (lambda out: (out / "quarantine.jsonl").unlink(), "quarantine.jsonl: missing"),
    "junk for a quarantine list": (
        lambda out: patched(out / "quarantine.jsonl", lambda raw: raw + b"junk\n"),
        "quarantine.jsonl: missing, or not",
    ),
    "a shard that is a number": (
        lambda out: rewrite(out, lambda said: said["shards"].__setitem__(0, 5)),
        "an entry of its shards is invalid",
    ),
    "a lost tar": (lambda out: (out / "tiny-train-0003.tar").unlink(), "0003.tar: missing"),
    "a foreign tar": (lambda out: shutil.copy(out / "tiny-train-0003.tar", out / "x.tar"), "x.tar: in no manifest"),
    "a label out of range": (lambda out: patched(out / "tiny-train-0000.tar", other_label), "out of range"),
    "an old index": (
        lambda out: shutil.copy(out / "tiny-train-0000.idx", out / "tiny-train-0001.idx"),
        "0001.idx: is not",
    ),
    "no index": (lambda out: (out / "tiny-train-0000.idx").unlink(), "0000.idx: missing"),
    "another table": (
        lambda out: shutil.copy(out / "tiny-train-0000.samples.npy", out / "tiny-train-0001.samples.npy"),
        "0001.samples.npy",
    ),
    "a pickled table": (
        lambda out: np.save(out / "tiny-train-0000.samples.npy", np.array([{}], dtype=object), allow_pickle=True),
        "0000.samples.npy: unreadable",
    ),
    "a cut merged table": (
        lambda out: patched(out / "tiny-train.samples.npy", lambda raw: raw[:-9]),
        "train.samples.npy",
    ),
    "fewer classes": (lambda out: patched(out / "synsets.txt", lambda raw: raw[:11]), "synsets.txt"),
    "another count": (lambda out: rewrite(out, lambda said: said.update(num_samples=99)), "99 samples"),
    "an info of another kind": (lambda out: (out / "_info.json").write_text('{"splits": [1]}'), "_info.json: says"),
    "an info of no split": (
        lambda out: (out / "_info.json").write_text('{"splits": {"train": 5}}'),
        "_info.json: says",
    ),
    "classes that lie elsewhere": (
        lambda out: rewrite(out, lambda said: said.update(class_file="../synsets.txt")),
        "leads out",
    ),
    "a class list that is a number": (lambda out: rewrite(out, lambda said: said.update(class_file=5)), "leads out"),
    "no info": (lambda out: (out / "_info.json").unlink(), "_info.json"),
    "a name that leads out": (
        lambda out: rewrite(out, lambda said: said["shards"][0].update(file="../x.tar")),
        "leads out",
    ),
    "a manifest that is none": (lambda out: (out / "manifest.json").write_text("[]"), "no manifest of format 1"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert make.run(make.tree(folder / "tiny", make.photographs(10)), folder / "out", "--shards", 6) == 0
    return folder / "out"


@pytest.mark.parametrize("damage", DAMAGES)
def test_check_sees(damage, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sharding.check.ProcessPoolExecutor", concurrent.futures.ThreadPoolExecutor)
    monkeypatch.setattr("sharding.check.get_context", lambda _: "")  # a thread pool takes a name prefix there
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert make.run("--check", out) == 0
    DAMAGES[damage][0](out)
    assert make.run("--check", out) == 1
    assert DAMAGES[damage][1] in capsys.readouterr().out


def test_check_wants_a_manifest(tmp_path, capsys):
    assert make.run("--check", tmp_path) == 2
    assert "no manifest.json" in capsys.readouterr().err


def test_headers_of_our_own_tars_survive_our_own_walk(finished):
    for path in finished.glob("*.tar"):
        members = list(tar.Walk(tar.PlainFile(path), strict=True))
        assert {member.kind for member in members} == {"file"}
        assert len(members) % 3 == 0
