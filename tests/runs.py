"""Runs of the program for tests: small settings, starting it, and reading its output files."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from trainer import checkpoint

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 900  # seconds for a run on several ranks to get anywhere: other programs may use the machine
TINY = """
steps: 6
batch_size: 8
optim: {warmup_epochs: 1}
log: {every: 1, checkpoint_every: 100, tensorboard: false}
loca: {backbone: vit_nano_patch16, views: {focal_views: 1}, prototypes: 32, hidden: 64}
"""


VICREGL = """
method: vicregl
steps: 6
batch_size: 8
optim: {lr: 1.0e-3, warmup_epochs: 1}
log: {every: 1, checkpoint_every: 100, tensorboard: false}
vicregl:
  {backbone: vit_nano_patch16, drop_path: 0.0, views: {small: 1}, expander: [64, 64, 64], projector: [32, 32, 32]}
"""


def lines(out: Path) -> list[dict]:
    """The log, which must be JSON as everyone reads it: without NaN."""
    text = (out / "log.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def final(out: Path) -> checkpoint.Payload:
    saved = checkpoint.latest(out / "checkpoints")
    assert saved is not None
    return saved


def assert_same(a: object, b: object) -> None:
    """Equal bit for bit, all the way down."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert isinstance(b, list | tuple)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_run(a: Path, b: Path) -> None:
    for key in ("model", "optimizer", "loader"):
        assert_same(final(a)[key], final(b)[key])
    assert [line["loss"] for line in lines(a)] == [line["loss"] for line in lines(b)]


def command(*argv: str) -> list[str]:
    return [sys.executable, str(ROOT / "trainer" / "run.py"), *argv]


def start_ranks(
    *argv: str, ranks: int = 2, options: tuple[str, ...] = (), quiet: bool = False
) -> subprocess.Popen[str]:
    """The program on gloo ranks, by torchrun with `options`. The default port is any free one."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv-backend=c10d"]
    launch += ["--rdzv-endpoint=localhost:0", *options, *command(*argv)[1:]]
    threads, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.DEVNULL if quiet else subprocess.PIPE
    return subprocess.Popen(launch, env=threads, stdout=pipe, stderr=pipe, text=True)


def on_ranks(*argv: str, ranks: int = 2, timeout: float = PATIENCE) -> str:
    """What it prints."""
    process = start_ranks(*argv, ranks=ranks)
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    return out


def status(out: Path) -> str:
    """How the run in `out` goes, as scripts read it."""
    return json.loads((out / "status.json").read_text())["state"]


def workers(out: Path) -> dict[int, int]:
    """The processes of the run in `out` by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # others come and go
            mine = str(out).encode() in (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
            rank = [int(word[5:]) for word in environment if word.startswith(b"RANK=")]
            if mine and rank:
                found[rank[0]] = int(process.name)
    return found


def wait_for(out: Path, step: int) -> None:
    """Returns when the run in `out` has logged `step`."""
    deadline = time.monotonic() + PATIENCE
    while not (out / "log.jsonl").exists() or len(lines(out)) < step:
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.05)


def kill_rank(rank: int, out: Path, step: int) -> None:
    """Kills a rank of the run in `out`, as the kernel does where memory runs out, when it has logged `step`."""
    wait_for(out, step)
    os.kill(workers(out)[rank], signal.SIGKILL)
