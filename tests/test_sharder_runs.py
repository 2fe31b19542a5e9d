"""The sharder's runs: kills, full disks, second runs, and parts on several machines."""

import errno
import json
import multiprocessing
import operator
import os
import random
import re
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import sharder_sources as make
from sharding import plan, pool, samples, target


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    files = make.photographs(10)
    files["n01440764/n01440764_broken.JPEG"] = files["n01440764/n01440764_1.JPEG"][:-200]
    files["n01443537/n01443537_png.JPEG"] = make.encode(77, "PNG")
    return make.tree(tmp_path_factory.mktemp("runs") / "tiny", files)


@pytest.fixture(scope="module")
def wanted(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wanted")
    assert make.run(source, out, "--shards", 6) == 0
    return make.contents(out)


def whole_shards_only(out, wanted):
    """Whatever is visible is what it will be in the end."""
    for path in out.glob("*.*"):
        if not path.name.startswith(".") and path.name != "quarantine.jsonl":
            assert path.read_bytes() == wanted[path.name], path.name


# --- interruptions ---------------------------------------------------------------------------------------------------


# Imported by every Python at its start. It ends the sharder at a place, not at a time: no machine is too fast for it.
KILLER = """
import os, signal, sys

def hook(event, arguments):
    if event == "os.rename":
        counter = os.open({counter!r}, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.write(counter, b".")
        if os.fstat(counter).st_size >= {place}:
            {end}(os.getpgid(0), signal.SIGKILL)  # its number is that of the first process, which began the group
        os.close(counter)

sys.addaudithook(hook)
"""


def killed_at(place, folder, whole_group, *words):
    """Runs the command; when it or a worker renames its `place`-th file, the parent is killed, or all of them are."""
    end = "os.killpg" if whole_group else "os.kill"
    folder.mkdir()
    counter = str(folder / "counter")
    (folder / "sitecustomize.py").write_text(KILLER.format(counter=counter, place=place, end=end))
    path = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
    process = make.command(*words, "--workers", 2, env={"PYTHONPATH": path})
    said = process.communicate()  # returns when no worker holds the pipes any more
    assert process.returncode == -signal.SIGKILL, said


def kill_until_done(source, out, wanted, options, kills, whole_group, seed):
    """Kills at `kills` random places, of which even the last come before the end, and then lets it end."""
    luck, places = random.Random(seed), 4 * 12 // kills  # a shard renames four files
    for kill in range(kills):
        killed_at(
            luck.randint(1, places), out.with_name(f"{out.name}.killer{kill}"), whole_group, source, out, *options
        )
        whole_shards_only(out, wanted)
    process = make.command(source, out, *options, "--workers", 2)
    said = process.communicate()
    assert process.returncode == 0, said
    assert make.contents(out) == wanted


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory):
    """Images large enough that a kill falls into the work."""
    files = {f"one/{number}.jpg": make.encode(number, size=(800, 1000)) for number in range(36)}
    return make.tree(tmp_path_factory.mktemp("slow") / "big", files)


@pytest.fixture(scope="module")
def slow_wanted(slow_source, tmp_path_factory):
    out = tmp_path_factory.mktemp("slow-wanted")
    assert make.run(slow_source, out, "--shards", 12, "--short-side", 400) == 0
    return make.contents(out)


@pytest.mark.parametrize("whole_group", [True, False])
def test_killed_twice_and_still_the_same_bytes(whole_group, slow_source, slow_wanted, tmp_path):
    options = ("--shards", 12, "--short-side", 400)
    kill_until_done(slow_source, tmp_path / "out", slow_wanted, options, 2, whole_group, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_killed_again_and_again(packed, slow_source, slow_wanted, tmp_path):
    source = slow_source
    if packed:
        files = {f"one/{path.name}": path.read_bytes() for path in slow_source.glob("*/*.jpg")}
        source = tmp_path / "big.tar.gz"
        source.write_bytes(make.tar_of(files, mode="w:gz"))
    options = ["--shards", 12, "--short-side", 400, "--name", "big"]
    assert make.run(source, tmp_path / "wanted", *options) == 0
    wanted = make.contents(tmp_path / "wanted")
    for seed in range(3):
        kill_until_done(source, tmp_path / f"out{seed}", wanted, options, 12, bool(seed % 2), seed)
    assert {name: one for name, one in wanted.items() if name.endswith(".tar")} == {
        name: one for name, one in slow_wanted.items() if name.endswith(".tar")
    }


def test_a_worker_dies_with_its_parent(slow_source, tmp_path):
    options = ("--short-side", 400, "--shards", 12)
    killed_at(20, tmp_path / "killer", False, slow_source, tmp_path / "out", *options)
    before = make.contents(tmp_path / "out")
    time.sleep(0.5)
    assert make.contents(tmp_path / "out") == before
    assert len(list((tmp_path / "out").glob("*.tar"))) < 12


def test_a_worker_that_fails_just_now_is_not_taken_for_one_that_is_done(monkeypatch):
    """Its pipe closes a little before its exit code can be read: the first look finds none."""
    exitcode, looks = multiprocessing.process.BaseProcess.exitcode, {}

    def late(process):
        looks[process.pid] = looks.get(process.pid, 0) + 1
        return exitcode.fget(process) if looks[process.pid] % 2 == 0 else None

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "exitcode", property(late))
    with pytest.raises(RuntimeError, match="TypeError"):
        pool.run(operator.add, [0, 1], 2, workers=2)  # a shard alone cannot be added


def test_a_worker_that_is_killed_is_a_sentence():
    with pytest.raises(RuntimeError, match="a worker was killed"):
        pool.run(os._exit, [0, 1], 2, workers=2)  # without a word, and with exit code 0


def test_a_full_disk_is_a_sentence_and_the_next_run_ends_the_same(slow_source, slow_wanted, tmp_path):
    options = (slow_source, tmp_path / "out", "--shards", 12, "--short-side", 400)
    limit = 40_000  # a shard is larger: its write fails half-way, as on a full disk
    assert max(map(len, slow_wanted.values())) > limit
    process = make.command(
        *options, "--workers", 1, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    _, said = process.communicate()
    assert process.returncode == 1
    assert len(said.strip().splitlines()) == 1, said
    assert not list((tmp_path / "out").glob("*.tar"))
    left = [path.name for path in (tmp_path / "out").rglob("*.tar.*")]
    assert not left, "half-written files are removed"
    assert make.run(*options) == 0
    assert make.contents(tmp_path / "out") == slow_wanted


def failing(monkeypatch, word, error, times):
    """Reading the file whose name holds `word` fails `times` times."""
    original, left = Path.read_bytes, [times]

    def read_bytes(path):
        if word in path.name and left[0]:
            left[0] -= 1
            raise error
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(samples, "_RETRIES", (0.0, 0.0))


def test_a_read_error_is_tried_again(source, wanted, tmp_path, monkeypatch):
    failing(monkeypatch, "n02105855_3", OSError(errno.EIO, "Input/output error"), times=2)
    assert make.run(source, tmp_path, "--shards", 6) == 0
    assert make.contents(tmp_path) == wanted


@pytest.mark.parametrize(
    ("error", "times"),
    [
        (FileNotFoundError(errno.ENOENT, "gone", "n02105855_3.JPEG"), 1),
        (PermissionError(errno.EACCES, "Permission denied", "n02105855_3.JPEG"), 1),
        (OSError(errno.EIO, "Input/output error"), 3),
    ],
)
def test_a_source_that_cannot_be_read_stops_the_run(error, times, source, wanted, tmp_path, monkeypatch, capsys):
    """It says nothing about the image: a set that left it out would not be made again with the same bytes."""
    with monkeypatch.context() as during:
        failing(during, "n02105855_3", error, times)
        assert make.run(source, tmp_path, "--shards", 6) == 1
        said = capsys.readouterr().err
        assert "still mounted" in said
        assert "n02105855_3.JPEG" in said
    whole_shards_only(tmp_path, wanted)
    assert make.run(source, tmp_path, "--shards", 6) == 0
    assert make.contents(tmp_path) == wanted


# --- second runs -----------------------------------------------------------------------------------------------------


def test_two_on_one_target_are_refused(source, tmp_path, capsys):
    made = target.Target(tmp_path, target.Spec("tiny", "train", 1, 0, {}, {}, []))
    with made.lock((0, 1)):
        assert make.run(source, tmp_path) == 1
        assert "another sharder" in capsys.readouterr().err
        assert make.run(source, tmp_path, "--part", "0/2") == 1
    with made.lock((0, 2)):
        assert make.run(source, tmp_path) == 1
        assert make.run(source, tmp_path, "--part", "0/2") == 1
        assert make.run(source, tmp_path, "--part", "1/2") == 0
    assert make.run(source, tmp_path) == 0


def test_two_splits_take_turns_at_the_files_they_share(tmp_path):
    """Each would otherwise find no manifest.json and write one, or read an _info.json that the other is writing."""
    train, val = (target.Target(tmp_path, target.Spec("tiny", split, 1, 0, {}, {}, [])) for split in ("train", "val"))
    order = []

    def second():
        with val.exclusive():
            order.append("val")

    other = threading.Thread(target=second)
    with train.exclusive():
        other.start()
        time.sleep(0.2)
        order.append("train")
    other.join(10)
    assert order == ["train", "val"]
    assert not list(tmp_path.iterdir())


def test_a_finished_set_is_left_alone_and_what_was_lost_is_made_again(source, wanted, tmp_path, capsys):
    assert make.run(source, tmp_path, "--shards", 6) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert make.run(source, tmp_path, "--shards", 6) == 0
    assert "is complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    (tmp_path / "tiny-train-0002.tar").unlink()
    (tmp_path / "tiny-train-0004.idx").unlink()
    assert make.run(source, tmp_path, "--shards", 6) == 0
    assert make.contents(tmp_path) == wanted


@pytest.mark.parametrize("ending", [".samples.npy", ".idx", ".tar"])
@pytest.mark.parametrize("length", [0, 100])
@pytest.mark.parametrize("finished", [False, True])
def test_a_damaged_file_of_a_shard_is_made_again(ending, length, finished, source, wanted, tmp_path):
    assert make.run(source, tmp_path, "--shards", 6, *(() if finished else ("--part", "0/2"))) == 0
    os.truncate(tmp_path / f"tiny-train-0002{ending}", length)
    assert make.run(source, tmp_path, "--shards", 6) == 0
    assert make.contents(tmp_path) == wanted


@pytest.mark.parametrize("name", ["tiny-train.samples.npy", "_info.json", "synsets.txt"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 100 if path.suffix == ".npy" else 5)])
def test_a_damaged_file_beside_the_manifest_is_made_again(name, damage, source, wanted, tmp_path):
    assert make.run(source, tmp_path, "--shards", 6) == 0
    damage(tmp_path / name)
    assert make.run(source, tmp_path, "--shards", 6) == 0
    assert make.contents(tmp_path) == wanted


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"entry": 5}', "[" * 100_000])
def test_a_damaged_record_costs_its_shard(damage, source, wanted, tmp_path):
    assert make.run(source, tmp_path, "--shards", 6, "--part", "0/2") == 0
    (record,) = (tmp_path / ".tiny-train.work").glob("record*2.json")
    record.write_text(damage)
    assert make.run(source, tmp_path, "--shards", 6) == 0
    assert make.contents(tmp_path) == wanted


@pytest.mark.parametrize("damage", ["", "[]", "{}", "[" * 100_000])
def test_a_damaged_manifest_is_a_sentence(damage, source, tmp_path, capsys):
    assert make.run(source, tmp_path, "--shards", 6) == 0
    (tmp_path / "manifest.json").write_text(damage)
    assert make.run(source, tmp_path, "--shards", 6) == 2
    said = capsys.readouterr().err
    assert "manifest.json" in said
    assert len(said.splitlines()) == 1
    assert make.run("--check", tmp_path) == 1
    assert "no manifest of format 1" in capsys.readouterr().out


@pytest.mark.parametrize("options", [("--seed", 5), ("--quality", 50), ("--shards", 4), ("--short-side", 9)])
def test_other_options_are_refused_whether_finished_or_not(options, source, tmp_path, capsys):
    base = {"--shards": 6} | dict([options])
    words = [word for pair in base.items() for word in pair]
    assert make.run(source, tmp_path, "--shards", 6, "--part", "0/2") == 0
    assert make.run(source, tmp_path, *words) == 2
    assert "unfinished run with" in capsys.readouterr().err
    assert make.run(source, tmp_path, "--shards", 6) == 0
    before = make.contents(tmp_path)
    assert make.run(source, tmp_path, *words) == 2
    said = capsys.readouterr().err
    assert options[0].strip("-").replace("-", "_") in said
    assert make.contents(tmp_path) == before


def test_a_changed_source_is_refused(tmp_path):
    files = make.photographs(3)
    source = make.tree(tmp_path / "tiny", files)
    assert make.run(source, tmp_path / "out") == 0
    (source / "n01440764/n01440764_0.JPEG").write_bytes(b"longer than before" * 1000)
    assert make.run(source, tmp_path / "out") == 2


def test_strict_and_dry_run(source, wanted, tmp_path, capsys):
    assert make.run(source, tmp_path / "out", "--shards", 6, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "32 images" in said
    assert "6 shards" in said
    assert not (tmp_path / "out").exists()
    assert make.run(source, tmp_path / "out", "--shards", 6, "--strict") == 1
    assert "1 image(s) quarantined" in capsys.readouterr().err
    assert "n01440764_broken" in (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert make.run(source, tmp_path / "out", "--shards", 6) == 0
    assert make.contents(tmp_path / "out") == wanted
    capsys.readouterr()
    assert make.run(source, tmp_path / "out", "--shards", 6, "--strict") == 1  # finished, and not as asked
    assert "1 image(s) were quarantined" in capsys.readouterr().err


def test_what_was_repaired_and_refused_is_told(wanted):
    manifest = json.loads(wanted["manifest.json"])
    assert (manifest["num_samples"], manifest["repaired"], manifest["quarantined"]) == (31, 1, 1)
    assert manifest["counts"] == {"PNG to JPEG": 1}
    (line,) = map(json.loads, wanted["quarantine.jsonl"].splitlines())
    assert line["key"] == "n01440764_broken"
    assert "does not decode" in line["reason"]
    assert line["source"] == "n01440764/n01440764_broken.JPEG"


def test_a_plain_line_where_there_is_no_terminal(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pool, "_LINE_EVERY", 0.0)
    assert make.run(source, tmp_path) == 0
    said = capsys.readouterr().out.splitlines()
    listed = [line.partition(" images, ")[0] for line in said if line.startswith("listing ") and "MB/s" in line]
    assert listed == [f"listing {number}" for number in range(1, 33)]  # of an unknown number
    lines = [line for line in said if line.startswith("sharding ")]
    assert "images/s" in lines[-1]
    assert "MB/s" in lines[-1]
    assert "1 repaired, 1 quarantined" in lines[-1]
    assert lines[-1].startswith("sharding 32/32")


def test_the_source_may_move_between_two_runs(source, wanted, tmp_path):
    moved = shutil.copytree(source, tmp_path / "before" / "tiny")
    assert make.run(moved, tmp_path / "out", "--shards", 6, "--part", "0/2") == 0
    moved = shutil.move(moved, tmp_path / "tiny")
    process = make.command(moved, tmp_path / "out", "--shards", 6, "--workers", 2)
    assert process.communicate() and process.returncode == 0
    assert make.contents(tmp_path / "out") == wanted


def test_a_target_inside_the_source_is_refused(source, capsys):
    assert make.run(source, source / "out") == 2
    assert "lies inside" in capsys.readouterr().err


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["torchrun", "slurm", "option"])
def test_parts_make_the_same_set(launcher, source, wanted, tmp_path, monkeypatch, capsys):
    for rank in (2, 0, 1):
        assert not (tmp_path / "manifest.json").exists()
        words = []
        if launcher == "torchrun":
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "3")
        elif launcher == "slurm":
            for name, value in {"ID": 10 + 2 * rank, "COUNT": 3, "MIN": 10, "STEP": 2}.items():
                monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        else:
            words = ["--part", f"{rank}/3"]
        assert make.run(source, tmp_path, "--shards", 6, *words) == 0
    assert make.contents(tmp_path) == wanted


def test_parts_at_the_same_time(source, wanted, tmp_path):
    running = [
        make.command(source, tmp_path, "--shards", 6, "--part", f"{rank}/3", "--workers", 1) for rank in range(3)
    ]
    for process in running:
        said = process.communicate()
        assert process.returncode == 0, said
    assert make.contents(tmp_path) == wanted


def test_a_part_says_what_is_missing_and_finishes_what_is_there(source, wanted, tmp_path, monkeypatch, capsys):
    assert make.run(source, tmp_path, "--shards", 6, "--part", "0/2") == 0
    assert "3 of 6 shards" in capsys.readouterr().out
    with monkeypatch.context() as killed:  # the last part dies after its last shard
        killed.setattr("sharding.target.Target._describe", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        assert make.run(source, tmp_path, "--shards", 6, "--part", "1/2") == 1
    assert make.run(source, tmp_path, "--shards", 6, "--part", "0/2") == 0  # any part finishes, run again
    assert make.contents(tmp_path) == wanted


def test_a_launcher_without_sense_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        make.run(source, tmp_path)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["ftp://host/x"], "addresses begin with s3://"), (["out", "b.tar"], "'b.tar': .*in quotes")],
)
def test_words_that_name_no_target_are_refused(source, words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        make.run(source, *words)
    assert stopped.value.code == 2 and re.search(sentence, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_the_plan_is_mapped_not_loaded(source, tmp_path):
    """A worker's memory does not grow with the set."""
    assert make.run(source, tmp_path, "--part", "0/2", "--shards", 6) == 0
    for column in plan.load(tmp_path / ".tiny-train.work"):
        assert isinstance(column, np.memmap)


def test_damaged_unpacked_images_are_unpacked_again(tmp_path):
    path = tmp_path / "tiny.tar.gz"
    path.write_bytes(make.tar_of(make.photographs(4), mode="w:gz"))
    assert make.run(path, tmp_path / "out", "--part", "0/2", "--shards", 2) == 0
    work = tmp_path / "out" / ".tiny-train.work"
    (work / "unpacked.1").write_bytes(b"short")
    assert make.run(path, tmp_path / "out", "--shards", 2) == 0
    assert make.run("--check", tmp_path / "out") == 0
