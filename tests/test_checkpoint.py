"""Checkpoints: written atomically, newest readable one first, nothing unpickled."""

import copy
import itertools
import os
import pickle
import signal
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from runs import assert_same

import trainer
from trainer import checkpoint, export
from trainer.methods import loca


def payload(step: int) -> checkpoint.Payload:
    return {"step": step, "method": "loca", "config": "", "model": {"w": torch.full((3,), float(step))}}


def write(folder: Path, *steps: int, keep_last: int = 3, keep_every: int | None = None) -> None:
    for step in steps:
        assert checkpoint.save(folder, payload(step), keep_last=keep_last, keep_every=keep_every)


def test_the_newest_comes_back(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 10)
    saved = checkpoint.latest(tmp_path)
    assert saved is not None
    assert saved["step"] == 10
    assert torch.equal(saved["model"]["w"], torch.full((3,), 10.0))
    assert (tmp_path / "last").resolve().name == "step_000000010.pt"
    assert not list(tmp_path.glob("*.part"))


def test_none_without_checkpoints(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_old_ones_go_and_milestones_stay(tmp_path: Path) -> None:
    write(tmp_path, *range(1, 11), keep_last=2, keep_every=5)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == [f"step_{s:09d}.pt" for s in (5, 9, 10)]


def test_a_file_system_without_links_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    write(tmp_path, 1, 2, keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000002.pt"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other format", "pickle"])
def test_an_unreadable_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 1, 2)
    newest = tmp_path / "step_000000002.pt"
    if damage == "truncated":
        newest.write_bytes(newest.read_bytes()[:-100])
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "text":
        newest.write_text("<html>")
    elif damage == "other format":
        torch.save({"format": 99}, newest)
    else:
        newest.write_bytes(pickle.dumps(Evil()))
    with pytest.warns(UserWarning, match="step_000000002"):
        saved = checkpoint.latest(tmp_path)
    assert saved is not None
    assert saved["step"] == 1


class Evil:
    def __reduce__(self) -> tuple:
        return (os._exit, (66,))  # the test process would end here


def test_a_full_disk_keeps_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert not checkpoint.save(tmp_path, payload(2), keep_last=1, keep_every=None)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_000000001.pt"]
    assert not list(tmp_path.glob("*.part"))


TINY = {"backbone": "vit_pico_patch16", "hidden": 8, "prototypes": 4}


@pytest.fixture(scope="module")
def whole() -> checkpoint.Payload:
    """A checkpoint that is what it says."""
    model = loca.Method(loca.Config(**TINY)).state_dict()
    return {"step": 3, "method": "loca", "config": yaml.safe_dump({"method": "loca", "loca": TINY}), "model": model}


LIES = {
    "no step": ({"step": None}, "'step'"),
    "step a text": ({"step": "3"}, "'step'"),
    "step below 0": ({"step": -1}, "'step'"),
    "no method": ({"method": None}, "'method'"),
    "method a number": ({"method": 5}, "'method'"),
    "method unknown": ({"method": "lorca"}, "'lorca'.*loca, vicregl"),
    "method a file of the folder": ({"method": "__init__"}, "'__init__'"),
    "method a path": ({"method": "../evaluate"}, "evaluate"),
    "another method": ({"method": "vicregl"}, "vicregl"),
    "no config": ({"config": None}, "'config'"),
    "config a mapping": ({"config": TINY}, "'config'"),
    "config a text": ({"config": "hello"}, "settings"),
    "config tagged": ({"config": "loca: !!python/object/apply:os._exit [66]"}, "settings"),
    "config a bomb": ({"config": "a: &a [x, x]\nb: &b [*a, *a]\nloca: {hidden: *b}"}, "aliases"),
    "config broken": ({"config": "loca: {"}, "settings"),
    "config of nothing": ({"config": "optim: {}"}, "settings.*loca"),
    "settings a list": ({"config": "loca: [1]"}, "settings"),
    "settings unknown": ({"config": "loca: {hiden: 8}"}, "hiden"),
    "settings of an older version": ({"config": "loca: {size: 224, hidden: 8}"}, "unknown size: before version 0.2"),
    "views a path": ({"config": "loca: {views: /etc/passwd}"}, "views must be a mapping"),
    "settings of another type": ({"config": "loca: {hidden: wide}"}, "hidden"),
    "settings out of range": ({"config": "loca: {eta: 2}"}, "eta is 2"),
    "settings of other sizes": (
        {"config": "loca: {backbone: vit_pico_patch16, hidden: 9, prototypes: 4}"},
        "hidden|size",
    ),
    "no model": ({"model": None}, "'model'"),
    "model a list": ({"model": [1]}, "'model'"),
    "model empty": ({"model": {}}, "'model'"),
    "model of numbers": ({"model": {"w": 3}}, "'model'"),
    "model of another network": ({"model": {"w": torch.zeros(3)}}, "weights"),
    "optimizer a list": ({"optimizer": [1]}, "'optimizer'"),
    "loader a text": ({"loader": "x"}, "'loader'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_checkpoint_that_lies_is_one_sentence(
    tmp_path: Path, whole: checkpoint.Payload, lie: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In export, in evaluate, and for whoever restores it. None stands for a key that is missing."""
    change, sentence = LIES[lie]
    for path, saved in (
        ("lie.pt", {**whole, **change}),
        ("gap.pt", {k: v for k, v in whole.items() if k not in change}),
    ):
        checkpoint.write(tmp_path / path, saved)
    files = ["lie.pt", "gap.pt"] if None in change.values() else ["lie.pt"]
    for path in files:
        with pytest.raises(ValueError, match=sentence) as error:
            checkpoint.restore(checkpoint.load(tmp_path / path))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
        assert export.main([str(tmp_path / path), str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_backbone_for_code_of_ones_own(tmp_path: Path, whole: checkpoint.Payload) -> None:
    checkpoint.save(tmp_path / "checkpoints", whole, keep_last=1, keep_every=None)
    for where in (tmp_path, str(tmp_path / "checkpoints" / "last")):
        backbone = trainer.load(where)
        assert not any(module.training for module in backbone.modules())
        for name, value in backbone.state_dict().items():
            assert torch.equal(value, whole["model"][f"teacher.backbone.{name}"])
    with pytest.raises(ValueError, match="nowhere"):
        trainer.load(tmp_path / "nowhere")


def test_an_optimizer_s_lies_are_one_sentence(whole: checkpoint.Payload) -> None:
    method = loca.Method(loca.Config(**TINY))
    optimizer = torch.optim.AdamW(method.parameter_groups(0.1))
    state = checkpoint.state(method, optimizer)
    checkpoint.check_fit(method, optimizer, state)
    for lie in ({}, None, {"state": 3, "param_groups": []}, {"state": {}, "param_groups": []}):
        with pytest.raises(ValueError, match="other settings of the method") as error:
            checkpoint.check_fit(method, optimizer, {**state, "optimizer": lie})
        assert "\n" not in str(error.value)


def test_a_folder_of_unreadable_ones_is_not_an_empty_one(tmp_path: Path) -> None:
    """A run must not begin again where it has been, and put its first steps in the place of its last."""
    (tmp_path / "step_000000007.pt").write_text("<html>")
    with pytest.warns(UserWarning, match="step_000000007"), pytest.raises(ValueError, match="holds no readable"):
        checkpoint.latest(tmp_path)


def test_a_killed_writers_file_is_removed(tmp_path: Path) -> None:
    (tmp_path / "step_000000001.pt.0f0f0f0f.part").write_bytes(b"half")
    write(tmp_path, 2)
    assert not list(tmp_path.glob("*.part"))


def test_a_writer_lets_the_run_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One write at a time; what the disk refuses once is written at the second attempt; the payload is let go of."""
    begun, may_go_on, attempts = threading.Event(), threading.Event(), []
    whole = checkpoint.write

    def slow(path: Path, saved: checkpoint.Payload) -> None:
        attempts.append(path.name)
        begun.set()
        assert may_go_on.wait(20)
        if len(attempts) == 1:
            raise OSError(28, "No space left on device")
        whole(path, saved)

    monkeypatch.setattr(checkpoint, "write", slow)
    monkeypatch.setattr(checkpoint, "_PAUSES", (0.0,))
    writer = checkpoint.Writer(tmp_path, 1, None)
    assert writer.wait()
    saved = payload(1)
    weight = weakref.ref(saved["model"]["w"])
    writer.save(saved)
    assert begun.wait(20) and not list(tmp_path.glob("step_*"))  # and here the run would go on
    del saved
    may_go_on.set()
    with pytest.warns(UserWarning, match="no checkpoint at step 1: .*No space left"):
        writer.save(payload(2))
    assert writer.wait() and weight() is None
    assert attempts == ["step_000000001.pt"] * 2 + ["step_000000002.pt"]
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_000000002.pt"]


def test_what_is_written_does_not_change_meanwhile() -> None:
    """On a CPU torch hands out the weights themselves, which the next step changes."""
    method = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.1)
    saved = checkpoint.state(method, optimizer)
    before = copy.deepcopy(saved)
    method(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert_same(saved, before)
    assert not torch.equal(method.weight, saved["model"]["weight"])


def write_until_killed(folder: Path, first: int, pipe: int) -> None:
    """Checkpoints of 8 MB one after another; tells the step that is known to be on the disk."""
    writer = checkpoint.Writer(folder, keep_last=2, keep_every=None)
    for step in itertools.count(first):
        writer.save(payload(step) | {"model": {"w": torch.full((2_000_000,), float(step))}})  # waits for the one before
        os.write(pipe, (step - 1).to_bytes(8, "little"))


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_writes_keeps_a_checkpoint(tmp_path: Path) -> None:
    """A hundred kills, at any moment of a write, of removing the old ones, or in between."""
    random, last, torn = np.random.default_rng(0), 0, 0
    write(tmp_path, last)
    for _ in range(100):
        ours, theirs = os.pipe()
        if (child := os.fork()) == 0:
            write_until_killed(tmp_path, last + 1, theirs)
        os.close(theirs)
        told = os.read(ours, 8)
        time.sleep(random.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(ours, "rb") as pipe:
            told += pipe.read()
        torn += bool([*tmp_path.glob("*.part")])
        saved = checkpoint.latest(tmp_path)
        assert saved is not None
        known = int.from_bytes(told[-8:], "little")
        assert saved["step"] >= known >= last
        assert (saved["model"]["w"] == saved["step"]).all()
        assert checkpoint.load(tmp_path / "last")["step"] <= saved["step"]  # it is linked when the file is whole
        last = saved["step"]
    assert last > 20 and torn > 20, (last, torn)  # writes got done, and kills hit others
