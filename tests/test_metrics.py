"""Numbers on their way to the log, and where it is written."""

import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from runs import lines

from trainer import metrics
from trainer.config import UsageError


def test_what_is_not_finite_hides_nothing() -> None:
    meter, nan = metrics.Meter(), torch.nan
    for loss, norm in ((1.0, 2.0), (nan, torch.inf), (4.0, 7.0)):
        meter.add({"loss": torch.tensor(loss), "grad_norm": torch.tensor(norm), "poor": torch.tensor(nan)})
    means = meter.fetch("grad_norm")
    assert (means["loss"], means["grad_norm"], means["grad_norm_max"]) == (2.5, 4.5, 7.0) and means["poor"] != means[
        "poor"
    ]


def test_a_log_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = metrics.Log(tmp_path, 0, 9, tensorboard=False, wandb=None)
    log.line({"step": 1, "loss": 2.0, "poor": float("nan"), "step_ms": 1.0})
    with Path("/dev/full").open("w") as full, log._file:
        log._file = full
        with pytest.warns(UserWarning, match="No space left on device; the run goes on"):
            log.line({"step": 2, "loss": 1.0, "step_ms": 6e8})
        log.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 2.0, "poor": None, "step_ms": 1.0}]
    assert "7 steps left, about 1166:40 hours" in capsys.readouterr().out


def test_a_log_that_cannot_be_rewritten_stays_whole(tmp_path: Path) -> None:
    """Going on from step 1 cuts off the lines after it: a full disk then must not cost the others."""
    for _ in range(2):
        log = metrics.Log(tmp_path, 0, 9, tensorboard=False, wandb=None)
        for step in (1, 2):
            log.line({"step": step, "loss": 2.0, "step_ms": 1.0})
        log.close()
    before = (tmp_path / "log.jsonl").read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))
    try:
        with pytest.raises(UsageError, match=r"log\.jsonl: cannot be written"):
            metrics.Log(tmp_path, 1, 9, tensorboard=False, wandb=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "log.jsonl").read_text() == before
    metrics.Log(tmp_path, 1, 9, tensorboard=False, wandb=None).close()
    assert [line["step"] for line in lines(tmp_path)] == [1]


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
