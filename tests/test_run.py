"""The program, whole: what it writes, that it goes on exactly where it was, and what it says when it cannot."""

import io
import json
import os
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partialmethod
from pathlib import Path

import pytest
import skimage
import torch
from mapimages import write_set
from PIL import Image
from scenes import pair, write_pairs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer import checkpoint, config, evaluate, interrupt, methods, metrics
from trainer.config import UsageError
from trainer.segmentation.monitor import Monitor

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 crops of a photograph in one foreign tar: two steps of 8 make an epoch."""
    folder = tmp_path_factory.mktemp("shards")
    photograph = Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png")
    with tarfile.open(folder / "cat.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(20):
            data = io.BytesIO()
            photograph.crop((10 * i, 5 * i, 10 * i + 200, 5 * i + 150)).save(data, "JPEG")
            member = tarfile.TarInfo(f"cat_{i:02d}.jpg")
            member.size = data.tell()
            tar.addfile(member, io.BytesIO(data.getvalue()))
    return folder


@pytest.fixture
def run(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """run.py's main in this process, on the tiny settings; its exit code."""
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # run.py replaces the first entry
    main = runpy.run_path(str(ROOT / "trainer" / "run.py"))["main"]
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    handlers = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    default = ["--config", str(config)]
    yield lambda *argv: main(["--shards", str(shards), *([] if "--config" in argv else default), *argv])
    for number, handler in handlers.items():
        signal.signal(number, handler)


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


def test_what_it_leaves_behind(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("--out", str(out), "--log.tensorboard", "true", "--data.threads", "99") == 0
    log = lines(out)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in log] == [0, 0, 1, 1, 2, 2]  # of the samples that the step saw
    wanted = """epoch loss lr weight_decay images_per_s images_per_s_rank step_ms data_wait_ms memory_gb skipped
    bad_samples position_loss position_accuracy cluster_loss me_max grad_norm grad_norm_max ema_momentum"""
    assert set(wanted.split()) <= set(log[-1])
    assert log[0]["lr"] == 0.0
    assert [log[i]["ema_momentum"] for i in (0, 3)] == pytest.approx([0.996, 0.998])
    assert all(line["grad_norm_max"] == pytest.approx(line["grad_norm"]) for line in log)  # a step a line
    printed = capsys.readouterr().out
    assert "not compiled" in printed and "2 steps an epoch, 6 in all" in printed
    assert "1 ranks x 99 decoding threads share" in printed
    assert "4 steps left, about 0:0" in printed
    assert (out / "config.yaml").read_text().count("vit_nano_patch16") == 1
    assert list((out / "tensorboard").glob("events*"))
    assert Image.open(out / "placements.png").size[0] > 1000
    assert final(out)["step"] == 6
    assert (out / "checkpoints" / "last").is_symlink()


@pytest.fixture(scope="session")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "whole"


@pytest.fixture
def whole(run: Callable[..., int], whole_folder: Path) -> Path:
    """The folder of a run on the tiny settings that nothing happened to."""
    assert whole_folder.exists() or run("--out", str(whole_folder)) == 0
    return whole_folder


def assert_same_run(a: Path, b: Path) -> None:
    for key in ("model", "optimizer", "loader"):
        assert_same(final(a)[key], final(b)[key])
    assert [line["loss"] for line in lines(a)] == [line["loss"] for line in lines(b)]


@pytest.mark.parametrize("stops", [[2, 3], [4]], ids=["edge of an epoch, then again", "later"])
def test_interrupted_and_resumed_is_uninterrupted(
    run: Callable[..., int], tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, stops: list[int]
) -> None:
    for stop in stops:
        done = len(lines(tmp_path / "parts")) if (tmp_path / "parts").exists() else 0
        calls = iter(range(done + 1, 7))
        monkeypatch.setattr(interrupt.Interrupt, "stop", lambda self, calls=calls, stop=stop: next(calls) == stop)
        assert run("--out", str(tmp_path / "parts")) == 75
        assert final(tmp_path / "parts")["step"] == stop
    monkeypatch.setattr(interrupt.Interrupt, "stop", lambda self: False)
    assert run("--out", str(tmp_path / "parts")) == 0
    assert_same_run(tmp_path / "parts", whole)


@pytest.mark.filterwarnings("ignore:no checkpoint at step")
def test_time_limit_and_full_disk(
    run: Callable[..., int], tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Out of time after a step: 75 and a checkpoint. Without room for another: warnings, the run goes on, and fails."""
    assert run("--out", str(tmp_path / "out"), "--stop-after", "0") == 75
    assert [line["step"] for line in lines(tmp_path / "out")] == [final(tmp_path / "out")["step"]] == [1]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))  # a file of a megabyte is too large for this disk
    try:
        with pytest.warns(UserWarning, match="no checkpoint at step 4.*too large; the ones before it are kept"):
            assert run("--out", str(tmp_path / "out"), "--log.checkpoint_every", "2") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the last steps are not kept" in capsys.readouterr().err
    assert final(tmp_path / "out")["step"] == 1
    assert [line["loss"] for line in lines(tmp_path / "out")] == [line["loss"] for line in lines(whole)]
    assert run("--out", str(tmp_path / "out")) == 0
    assert_same_run(tmp_path / "out", whole)


def test_a_probe_moves_nothing(
    run: Callable[..., int], tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """k-NN of the teacher on labelled shards, at the first line after it fell due; the run is the one without it.

    So is segmentation, with a picture for TensorBoard.
    """
    labelled, pairs = str(write_set(tmp_path / "labelled", 12, 1)), write_pairs(tmp_path / "pairs", [pair(0), pair(1)])
    probed = []

    def score(probe: evaluate.Probe, backbone: torch.nn.Module) -> float:
        probed.append({name: value.clone() for name, value in backbone.state_dict().items()})
        return original(probe, backbone)

    original = evaluate.Probe.__call__
    monkeypatch.setattr(evaluate.Probe, "__call__", score)
    sets = ["--probe.train", labelled, "--probe.val", labelled, "--probe.images", "9"]
    sets += ["--probe.segment_train", pairs, "--probe.segment_val", pairs]
    assert (
        run(
            "--out",
            str(tmp_path / "out"),
            *sets,
            "--probe.every",
            "1.25",
            "--log.every",
            "2",
            "--log.tensorboard",
            "true",
        )
        == 0
    )
    log = lines(tmp_path / "out")
    assert [line["step"] for line in log if "knn" in line] == [4, 6]  # due after 2.5 and 5
    teacher = checkpoint.restore(final(tmp_path / "out"))
    nine = evaluate.stored(
        teacher.backbone(), evaluate.labelled(labelled), size=224, batch_size=4, device="cpu", images=9
    )
    assert len(nine[1]) == 9 and log[-1]["knn"] == evaluate.knn_accuracy(nine, nine)
    dense = Monitor(config.Probe(segment_train=pairs, segment_val=pairs), teacher.mean, teacher.std, "cpu")
    miou, picture = dense(teacher.backbone())
    assert [line["segment_miou"] for line in log if "segment_miou" in line][1:] == [miou] and 0 < miou <= 100
    (board,) = (tmp_path / "out" / "tensorboard").iterdir()
    events = EventAccumulator(str(board)).Reload()
    shown = events.Images("segmentation")[-1]
    assert (shown.step, shown.height, shown.width) == (6, *picture.shape[:2])
    trained = final(tmp_path / "out")["model"]
    assert_same(probed[-1], {name: trained[f"teacher.backbone.{name}"] for name in probed[-1]})
    for key in ("model", "optimizer", "loader"):
        assert_same(final(tmp_path / "out")[key], final(whole)[key])


def test_a_run_begins_with_other_weights(run: Callable[..., int], tmp_path: Path, whole: Path) -> None:
    assert run("--out", str(tmp_path), "--init", str(whole), "--stop-after", "0") == 75
    first, given = final(tmp_path)["model"], final(whole)["model"]
    student = [name for name in first if name.startswith("student.")]
    assert_same({name: first[name] for name in student}, {name: given[name] for name in student})  # at a rate of 0


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


def test_a_refused_run_leaves_the_folder_as_it_was(run: Callable[..., int], tmp_path: Path, whole: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "out", symlinks=True)
    before = (out / "config.yaml").read_text()
    for other in (["--seed", "9"], ["--optim.name", "lars"]):
        with pytest.raises(UsageError, match="cannot go on"):
            run("--out", str(out), *other)
        assert (out / "config.yaml").read_text() == before


@pytest.mark.filterwarnings("ignore:.*trying the one before it")
@pytest.mark.parametrize(
    "lie", [{"model": None}, {"model": {}}, {"optimizer": {"state": {}, "param_groups": []}}, {"step": "6"}]
)
def test_a_checkpoint_that_lies_does_not_begin_a_new_run(
    run: Callable[..., int], tmp_path: Path, whole: Path, lie: dict
) -> None:
    out = tmp_path / "out"
    checkpoint.write(out / "checkpoints" / "step_000000006.pt", final(whole) | lie)
    with pytest.raises(UsageError, match="checkpoint"):
        run("--out", str(out), "--steps", "8")
    assert not (out / "log.jsonl").exists()


def test_a_dry_run_tells_and_writes_nothing(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--out", str(tmp_path / "out"), "--dry-run") == 0
    assert "8 images: " in (told := capsys.readouterr().out) and "GB peak" in told
    assert not (tmp_path / "out").exists()


def test_slices_of_a_batch_make_one_step(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("--out", str(tmp_path), "--speed.accumulate", "2") == 0
    assert lines(tmp_path)[-1]["step"] == 6
    assert final(tmp_path)["loader"]["epoch"] == 6 * 8 // 20  # 20 images hold five slices of four


def command(*argv: str) -> list[str]:
    return [sys.executable, str(ROOT / "trainer" / "run.py"), *argv]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_leaves_a_checkpoint(tmp_path: Path, shards: Path, number: signal.Signals) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.replace("steps: 6", "steps: 100000"))
    out = tmp_path / "out"
    process = subprocess.Popen(command("--config", str(config), "--shards", str(shards), "--out", str(out)))
    try:
        deadline = time.monotonic() + 60
        while not (out / "log.jsonl").exists() or not lines(out):
            assert time.monotonic() < deadline, "no step within a minute"
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(timeout=30) == 75
    finally:
        process.kill()
    assert final(out)["step"] == lines(out)[-1]["step"]


def start_two_ranks(*argv: str, restarts: int = 0) -> subprocess.Popen[str]:
    """The program on two gloo ranks."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    launch += ["--rdzv-endpoint=localhost:0"]  # any free port: tests may run side by side
    launch += [f"--max-restarts={restarts}", *command(*argv)[1:]]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(launch, env=threads, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def on_two_ranks(*argv: str) -> str:
    """What it prints."""
    process = start_two_ranks(*argv)
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]
    return out


def kill_rank(rank: int, out: Path, step: int) -> None:
    """Kills a rank of the run in `out`, as the kernel does where memory runs out, when it has logged `step`."""
    deadline = time.monotonic() + 100
    while not (out / "log.jsonl").exists() or len(lines(out)) < step:
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.05)
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # others come and go
            mine = str(out).encode() in (process / "cmdline").read_bytes().split(b"\0")
            if mine and f"RANK={rank}".encode() in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_run(tmp_path: Path, shards: Path, rank: int) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "out"
    config.write_text(TINY.replace("steps: 6", "steps: 100000"))
    process = start_two_ranks("--config", str(config), "--shards", str(shards), "--out", str(out))
    try:
        kill_rank(rank, out, 3)
        _, errors = process.communicate(timeout=45)  # torchrun gives the other rank 30 s to end by itself
    finally:
        process.kill()
    assert process.returncode == 1
    assert "Signal 9 (SIGKILL)" in errors and f"rank      : {rank}" in errors


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_rank(tmp_path: Path, shards: Path) -> None:
    """It goes on from its last checkpoint and ends with the weights of a run that lost none, and was probed besides."""
    config, labelled = tmp_path / "tiny.yaml", str(write_set(tmp_path / "labelled", 12, 1))
    config.write_text(TINY.replace("steps: 6", "steps: 24").replace("checkpoint_every: 100", "checkpoint_every: 5"))
    argv = ["--config", str(config), "--shards", str(shards), "--out"]
    on_two_ranks(
        *argv, str(tmp_path / "whole"), "--probe.train", labelled, "--probe.val", labelled, "--probe.every", "4"
    )
    assert [line["step"] for line in lines(tmp_path / "whole") if "knn" in line] == [8, 16, 24]
    process = start_two_ranks(*argv, str(tmp_path / "out"), restarts=1)
    try:
        kill_rank(1, tmp_path / "out", 8)
        printed, errors = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    assert "going on from step 5" in printed
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_two_ranks_and_then_one(run: Callable[..., int], tmp_path: Path, shards: Path) -> None:
    """Interrupted on two ranks, a run goes on with one: same samples, same losses as one rank from the start."""
    config = tmp_path / "two.yaml"
    config.write_text(VICREGL)
    assert run("--config", str(config), "--out", str(tmp_path / "one")) == 0
    two = str(tmp_path / "two")
    printed = on_two_ranks(
        "--config", str(config), "--shards", str(shards), "--out", two, "--log.checkpoint_every", "3"
    )
    assert "2 ranks x 1 x 4" in printed
    (tmp_path / "two" / "checkpoints" / "step_000000006.pt").unlink()  # as if it had died after step 3
    assert run("--config", str(config), "--out", two) == 0
    alone, changed = ([line["loss"] for line in lines(tmp_path / out)] for out in ("one", "two"))
    assert len(changed) == 6
    assert changed == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_fsdp_learns_what_ddp_learns(tmp_path: Path, shards: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    for kind in ("ddp", "fsdp"):
        out = str(tmp_path / kind)
        on_two_ranks("--config", str(config), "--shards", str(shards), "--out", out, "--speed.parallel", kind)
    ddp, fsdp = ([line["loss"] for line in lines(tmp_path / kind)] for kind in ("ddp", "fsdp"))
    assert fsdp == pytest.approx(ddp, rel=1e-5)
    ddp, fsdp = (final(tmp_path / kind)["model"] for kind in ("ddp", "fsdp"))
    assert ddp.keys() == fsdp.keys()
    for name, weight in ddp.items():
        torch.testing.assert_close(weight, fsdp[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["loca", "vicregl"])
def test_the_step_is_one_graph(
    run: Callable[..., int], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured once, without a break, and never again; what a backend makes of the graph is not its business."""
    config = tmp_path / "compiled.yaml"
    config.write_text({"loca": TINY, "vicregl": VICREGL}[method].replace("nano", "pico"))
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_, backend="eager"))
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert run("--config", str(config), "--out", str(tmp_path / "out"), "--speed.compile", "on") == 0
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert len(lines(tmp_path / "out")) == 6


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


@pytest.mark.parametrize("method", ["loca", "vicregl"])
def test_golden_losses(run: Callable[..., int], tmp_path: Path, method: str, request: pytest.FixtureRequest) -> None:
    """Ten losses of a seeded run. A refactor leaves them; a change of results says so with ``--write-golden``."""
    config = tmp_path / "golden.yaml"
    config.write_text({"loca": TINY, "vicregl": VICREGL}[method].replace("steps: 6", "steps: 10"))
    assert run("--config", str(config), "--out", str(tmp_path / "out")) == 0
    losses = [line["loss"] for line in lines(tmp_path / "out")]
    golden = ROOT / "tests" / "golden" / f"{method}.txt"
    if request.config.getoption("--write-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text("".join(f"{step} {loss:.6f}\n" for step, loss in enumerate(losses, 1)))
    expected = [float(line.split()[1]) for line in golden.read_text().splitlines()]
    assert losses == pytest.approx(expected, rel=2e-4)  # processors round differently


THIRD = '''
"""Predicts the mean colour of a view from its pixels; NaN at the steps that its settings name."""
from dataclasses import dataclass

import torch
from torch import nn

from pipeline import Batch, Recipe, recipes
from trainer import method
from trainer.backbones import normalise


@dataclass(frozen=True)
class Config:
    nan_from: float = 2.0
    nan_to: float = 2.0


def views(cfg: Config) -> Recipe:
    return recipes.plain()


class Method(method.Method):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg, self.layer = cfg, nn.Conv2d(3, 3, 16, 16)

    def forward(self, batch: Batch, progress: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        (view,) = batch.views.values()
        x = normalise(view.pixels, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        loss = (self.layer(x).mean((2, 3)) - x.mean((2, 3))).square().mean()
        poison = torch.where((progress >= self.cfg.nan_from) & (progress < self.cfg.nan_to), torch.nan, 1.0)
        return loss * poison, {"colour_loss": loss.detach()}
'''


@pytest.fixture
def third(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third objective: one file in a folder of its own."""
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "third.py").write_text(THIRD)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "trainer.methods.third", raising=False)
    (tmp_path / "tiny.yaml").write_text("steps: 6\nbatch_size: 8\nlog: {every: 3, tensorboard: false}\n")


@pytest.mark.usefixtures("third")
def test_a_third_objective_is_one_file(run: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text("steps: 6\nbatch_size: 8\nlog: {every: 3, tensorboard: false}\n")
    assert run("--method", "third", "--out", str(tmp_path / "out")) == 0
    assert "colour_loss" in lines(tmp_path / "out")[-1]


@pytest.mark.usefixtures("third")
def test_a_step_that_is_not_finite_moves_nothing(run: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text("steps: 6\nbatch_size: 8\nlog: {every: 3, tensorboard: false}\n")
    out = tmp_path / "out"
    assert run("--method", "third", "--out", str(out), "--third.nan_from", "0.3", "--third.nan_to", "0.6") == 0
    assert lines(out)[-1]["skipped"] == 2  # steps 3 and 4 of 6
    assert all(line["loss"] > 0 and line["grad_norm_max"] > 0 for line in lines(out))  # of the others
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [record["step"] for record in skipped] == [3, 4]
    assert all(len(record["keys"]) == 8 and record["keys"][0].startswith("cat_") for record in skipped)
    assert torch.isfinite(final(out)["model"]["layer.weight"]).all()


@pytest.mark.usefixtures("third")
def test_a_run_that_only_skips_ends(run: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text("steps: 6\nbatch_size: 8\nlog: {every: 3, tensorboard: false}\n")
    argv = ["--method", "third", "--out", str(tmp_path / "out"), "--third.nan_from", "0", "--optim.max_skipped", "3"]
    with pytest.raises(RuntimeError, match="3 steps in a row"):
        run(*argv)


@pytest.mark.parametrize("mistake", ["missing", "empty", "no tar", "batch", "out", "setting", "init", "probe", "wandb"])
def test_bad_input_is_one_sentence(
    run: Callable[..., int], tmp_path: Path, shards: Path, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("not a tar\n" * 200)
    (tmp_path / "file").write_text("")
    out = tmp_path / "out"
    argv = {
        "missing": ["--shards", str(tmp_path / "nowhere")],
        "empty": ["--shards", str(tmp_path / "empty")],
        "no tar": ["--shards", str(tmp_path / "text.tar")],
        "batch": ["--batch_size", "64"],
        "out": ["--out", str(tmp_path / "file" / "x")],
        "setting": ["--loca.eta", "2"],
        "init": ["--init", str(tmp_path / "text.tar")],
        "probe": ["--probe.train", str(shards), "--probe.val", str(shards)],  # without classes
        "wandb": ["--log.wandb", "x"],
    }[mistake]
    with pytest.raises(UsageError) as error:
        run("--out", str(out), *argv)
    assert "\n" not in str(error.value)
    assert not (out / "log.jsonl").exists()
