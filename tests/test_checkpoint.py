"""Checkpoints: whole or absent, newest readable first, nothing unpickled."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from trainer import checkpoint


def payload(step: int) -> checkpoint.Payload:
    return {"step": step, "method": "loca", "model": {"w": torch.full((3,), float(step))}}


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
