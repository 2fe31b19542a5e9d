"""Metrics: collecting numbers, and writing them to the log."""

import io
import resource
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from runs import lines

from trainer import config, console, metrics
from trainer.config import UsageError


def test_what_is_not_finite_hides_nothing() -> None:
    meter, nan = metrics.Meter(), torch.nan
    for loss, norm in ((1.0, 2.0), (nan, torch.inf), (4.0, 7.0)):
        meter.add({"loss": torch.tensor(loss), "grad_norm": torch.tensor(norm), "poor": torch.tensor(nan)})
    means = meter.fetch("grad_norm")
    assert (means["loss"], means["grad_norm"], means["grad_norm_max"]) == (2.5, 4.5, 7.0) and means["poor"] != means[
        "poor"
    ]


def test_a_log_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "PAUSE", 0.0)
    log = metrics.Log(tmp_path, 0, 9, config.Log(tensorboard=False))
    log.line({"step": 1, "epoch": 0, "loss": 2.0, "poor": float("nan"), "step_ms": 1.0})
    with Path("/dev/full").open("w") as full, log._file:
        log._file = full
        with pytest.warns(UserWarning, match="No space left on device; the run continues"):
            log.line({"step": 2, "epoch": 0, "loss": 1.0, "step_ms": 6e8})
        log.close()
    assert lines(tmp_path) == [{"step": 1, "epoch": 0, "loss": 2.0, "poor": None, "step_ms": 1.0}]
    assert capsys.readouterr().out.splitlines()[-1] == "step 2/9  epoch 1  loss 1  1166:40 h left"


def test_a_run_outlives_who_reads_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `run.py | head`, or where the disk of the file behind its output is full."""

    class Closed(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError(32, "Broken pipe")

    for output in (Closed(), None):  # None: closed before the start, by the shell's >&-
        monkeypatch.setattr("sys.stdout", output)
        said = console.Console(0, 2, ())
        for step in (1, 2):
            said.line({"step": step, "epoch": 0, "loss": 1.0, "step_ms": 1.0})
        said.close()


def test_a_line_says_little_and_seldom(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal: the first line, probes, the last one; the others only when half a minute has passed."""
    said = console.Console(0, 5, ("position_accuracy", "absent"))
    record = {"epoch": 3, "loss": 2.5, "lr": 1.0, "position_accuracy": 0.0861, "images_per_s": 103.2, "step_ms": 6e4}
    for step, more in enumerate(({}, {}, {"knn": 0.5}, {"bad_samples": 2}), 1):
        said.line({"step": step, **record, **more})
    said.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 1/5  epoch 4  loss 2.5  position_accuracy 8.6%  103 images/s  0:04 h left",
        "step 3/5  epoch 4  loss 2.5  position_accuracy 8.6%  knn 50.0%  103 images/s  0:02 h left",
        "step 4/5  epoch 4  loss 2.5  position_accuracy 8.6%  bad_samples 2  103 images/s  0:01 h left",
    ]


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    said = console.Console(2, 4, ())
    said.step()
    said.line({"step": 3, "epoch": 0, "loss": 2.5, "step_ms": 1.0})
    said.close()
    last = screen.getvalue().split("\r")[-1]
    assert " 75% |" in last and "step 3/4  epoch 1  loss 2.5  0:00 h left" in last


@pytest.mark.parametrize(("terminal", "fewest", "most"), [(False, 1, 3), (True, 4, 99)])
def test_a_count_fills_no_log(
    terminal: bool, fewest: int, most: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job's output is read afterwards: not a line for every tenth of a second."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    for _ in console.counting("scoring", range(5)):
        time.sleep(0.11)
    assert fewest <= capsys.readouterr().err.count("scoring") <= most
    assert not [*console.counting(None, "")] and not capsys.readouterr().err


def test_a_log_that_cannot_be_rewritten_stays_whole(tmp_path: Path) -> None:
    """Going on from step 1 cuts off the lines after it: a full disk then must not cost the others."""
    for _ in range(2):
        log = metrics.Log(tmp_path, 0, 9, config.Log(tensorboard=False))
        for step in (1, 2):
            log.line({"step": step, "epoch": 0, "loss": 2.0, "step_ms": 1.0})
        log.close()
    before = (tmp_path / "log.jsonl").read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))
    try:
        with pytest.raises(UsageError, match=r"log\.jsonl: cannot be written"):
            metrics.Log(tmp_path, 1, 9, config.Log(tensorboard=False))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "log.jsonl").read_text() == before
    metrics.Log(tmp_path, 1, 9, config.Log(tensorboard=False)).close()
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_a_log_of_something_else_is_cut_and_one_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    good, path = '{"step": 1, "loss": 2.0}\n', tmp_path / "log.jsonl"
    path.write_text('{"step": "a"}\n{"step": null}\n[3]\n7\n' + good + '{"step": 1, "lo')
    metrics.Log(tmp_path, 1, 9, config.Log(tensorboard=False)).close()
    assert path.read_text() == good
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError, match=r"log\.jsonl: cannot be written \(Is a directory\)"):
        metrics.Log(tmp_path, 1, 9, config.Log(tensorboard=False))


def wandb_records(content: bytes) -> Iterator[bytes]:
    """What a .wandb file holds: a LevelDB log, whose records are cut at blocks of 32 KiB, after a header of 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if at % 2**15 > 2**15 - 7:  # no room for a header: the block's end is padding
            at += -at % 2**15
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])  # after four bytes of checksum
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # all of a record, or the last of it
            yield whole
            whole = b""


def test_wandb_goes_on_where_the_run_does(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written offline, and read back from its files: one run, whose steps continue."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    argv = ("--out", str(tmp_path / "out"), "--log.wandb", "a project")
    assert run(*argv, "--stop-after", "0") == 75
    assert run(*argv) == 0
    runs, steps = set(), []
    for file in sorted((tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")):
        runs.add(file.stem)
        for data in wandb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("history"):
                steps.append({item.key or item.nested_key[0]: item.value_json for item in record.history.item}["_step"])
    assert len(runs) == 1
    assert steps == ["1", "2", "3", "4", "5", "6"]
