"""The whole training program: its files, its results, and its error messages."""

import json
import runpy
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from mapimages import write_set
from PIL import Image
from runs import ROOT, TINY, VICREGL, assert_same, final, lines
from scenes import pair, write_pairs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import host
from trainer import checkpoint, config, cost, evaluate, interrupt, methods, parallel
from trainer.config import UsageError
from trainer.method import Method
from trainer.segmentation.monitor import Monitor


def test_what_it_leaves_behind(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("--out", str(out), "--log.tensorboard", "true", "--data.num_threads", "99") == 0
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
    assert "not compiled" in printed and "2 steps an epoch, 6 to go" in printed
    assert "rises" not in printed  # for 2 steps
    assert "1 rank x 99 decoding threads share" in printed
    assert "step 6/6  epoch 3  loss " in printed and "position_accuracy" in printed and "0:00 h left" in printed
    assert "done at step 6 after 0:0" in printed and f"python -m trainer.export {out} exported" in printed
    assert (out / "config.yaml").read_text().count("vit_nano_patch16") == 1
    (board,) = (out / "tensorboard").iterdir()
    events = EventAccumulator(str(board)).Reload()
    assert {"loss/position_loss", "optim/lr", "speed/images_per_s"} <= set(events.Tags()["scalars"])
    assert {"views", "placements"} <= set(events.Tags()["images"]) and "config/text_summary" in events.Tags()["tensors"]
    assert Image.open(out / "placements.png").size[0] > 1000
    assert Image.open(out / "views.png").size == (3 * 96, 4 * 96)
    report = (out / "report.html").read_text()
    assert "done: step 6 of 6" in report and report.count("<polyline") > 15 and report.count("data:image/jpeg") == 2
    assert "not compiled" in report and "backbone: vit_nano_patch16" in report
    assert json.loads((out / "status.json").read_text()) == {"state": "done", "step": 6, "of": 6}
    assert final(out)["step"] == 6
    assert (out / "checkpoints" / "last").is_symlink()


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


@pytest.mark.parametrize("method", ["loca", pytest.param("vicregl", marks=pytest.mark.slow)])  # seconds of tracing
def test_the_step_is_one_graph(
    run: Callable[..., int], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured once, without a break, and never again; what a backend makes of the graph is not its business."""
    config = tmp_path / "compiled.yaml"
    config.write_text({"loca": TINY, "vicregl": VICREGL}[method].replace("nano", "pico"))
    monkeypatch.setattr(parallel, "compile_", partial(parallel.compile_, backend="eager"))
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert run("--config", str(config), "--out", str(tmp_path / "out"), "--speed.compile", "on") == 0
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert len(lines(tmp_path / "out")) == 6


def test_slices_of_a_batch_make_one_step(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("--out", str(tmp_path), "--speed.accumulate", "2") == 0
    assert lines(tmp_path)[-1]["step"] == 6
    assert final(tmp_path)["loader"]["epoch"] == 6 * 8 // 20  # 20 images hold five slices of four


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
    probes = {"train": labelled, "val": labelled, "images": "9", "segment_train": pairs, "segment_val": pairs}
    words = [word for name, value in probes.items() for word in (f"--probe.{name}", value)]
    words += "--probe.every 1.25 --log.every 2 --log.tensorboard true".split()
    assert run("--out", str(tmp_path / "out"), *words) == 0
    log = lines(tmp_path / "out")
    assert [line["step"] for line in log if "knn" in line] == [4, 6]  # due after 2.5 and 5
    teacher = checkpoint.restore(final(tmp_path / "out"))
    nine = evaluate.stored(
        teacher.backbone(), *evaluate.labelled(labelled), size=224, batch_size=4, device="cpu", images=9
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


def test_a_dry_run_tells_and_writes_nothing(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--out", str(tmp_path / "out"), "--dry-run") == 0
    assert "8 images: " in (printed := capsys.readouterr().out) and "GB peak" in printed
    assert not (tmp_path / "out").exists()


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
def third(run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third objective: one file in a folder of its own."""
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "third.py").write_text(THIRD)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "trainer.methods.third", raising=False)
    (tmp_path / "tiny.yaml").write_text("steps: 6\nbatch_size: 8\nlog: {every: 3, tensorboard: false}\n")


@pytest.mark.usefixtures("third")
def test_a_third_objective_is_one_file(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its defaults are those of a long run, which is said of a short one."""
    assert run("--method", "third", "--out", str(tmp_path / "out")) == 0
    assert "colour_loss" in lines(tmp_path / "out")[-1]
    assert "rises for 30 steps, and there are 6: lower optim.warmup_epochs" in capsys.readouterr().out


@pytest.mark.usefixtures("third")
def test_a_step_that_is_not_finite_moves_nothing(run: Callable[..., int], tmp_path: Path) -> None:
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
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="3 steps in a row"):
        run("--method", "third", "--out", str(out), "--third.nan_from", "0", "--optim.max_skipped", "3")
    assert json.loads((out / "status.json").read_text())["state"] == "failed"


@pytest.mark.usefixtures("third")
def test_divergence_is_one_sentence(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program as a shell starts it; Ctrl-C before its loop ends it like any other, without a traceback."""
    argv = ["run.py", "--method", "third", "--shards", str(shards), "--config", str(tmp_path / "tiny.yaml")]
    argv += ["--out", str(tmp_path / "out"), "--third.nan_from", "0", "--optim.max_skipped", "3"]
    handlers, before = {}, {number: signal.getsignal(number) for number in interrupt.SIGNALS}

    def connect() -> torch.device:
        handlers[signal.SIGINT] = signal.getsignal(signal.SIGINT)
        return torch.device("cpu")

    monkeypatch.setattr(parallel, "connect", connect)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "trainer" / "run.py"), run_name="__main__")
    for number, handler in before.items():
        signal.signal(number, handler)
    assert end.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "run.py" in line]
    assert len(errors) == 1 and "3 steps in a row had a non-finite loss" in errors[0]
    assert handlers[signal.SIGINT] == signal.SIG_DFL


@pytest.mark.usefixtures("third")
def test_what_only_informs_cannot_fail_a_run(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the count of operations nor the picture at the end."""

    def fail(*_: object) -> bool:
        raise MemoryError("no more")

    monkeypatch.setattr(cost, "synthetic", fail)
    monkeypatch.setattr(Method, "picture", fail)
    with pytest.warns(UserWarning, match="the cost of a step is not known: no more"):
        assert run("--method", "third", "--out", str(tmp_path / "out")) == 0
    assert "no picture of what was learned: no more" in capsys.readouterr().err


@pytest.mark.usefixtures("third")
@pytest.mark.parametrize("seed", [3 * 10**8, 2**63 - 1])
def test_a_seed_may_be_any_number(run: Callable[..., int], tmp_path: Path, seed: int) -> None:
    assert run("--method", "third", "--out", str(tmp_path / "out"), "--seed", str(seed), "--steps", "2") == 0


def test_a_run_that_does_not_fit_the_memory_names_one_that_does(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "memory", lambda: 2 * 10**7)
    with pytest.raises(UsageError, match=r"at least 0\.\d GB of memory, and 0\.0 GB are free: .*--config loca_demo$"):
        run("--out", str(tmp_path / "out"))


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
        "batch": ["--batch_size", "5000"],
        "out": ["--out", str(tmp_path / "file" / "x")],
        "setting": ["--loca.eta", "2"],
        "init": ["--init", str(tmp_path / "text.tar")],
        "probe": ["--probe.train", str(shards), "--probe.val", str(shards)],  # without classes
        "wandb": ["--log.wandb", "x"],
    }[mistake]
    with pytest.raises(UsageError) as error:
        run("--out", str(out), *argv)
    assert "\n" not in str(error.value)
    assert ("speed.accumulate" in str(error.value)) == (mistake == "batch") and "drop_last" not in str(error.value)
    assert not (out / "log.jsonl").exists() and not (out / "status.json").exists()
