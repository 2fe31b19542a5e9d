"""Fine-tuning: the whole program, the weights that it starts from, and subsets against plain oracles."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import ROOT, assert_same, assert_same_run, final, lines
from scenes import NAMES, pair, small_network, write_pairs

from pipeline import ShardSet, recipes
from trainer import checkpoint, config, downstream, methods, parallel
from trainer import finetune as program
from trainer.cost import synthetic
from trainer.methods import finetune, loca
from trainer.segmentation.labelled import VOID, Labelled

SMALL = """--steps 7 --batch_size 8 --log.every 1 --log.tensorboard false --log.keep_last 9 --data.num_threads 1
    --finetune.views.size 32 --finetune.views.short_side 40 --finetune.stride 16 --optim.lr 1e-3""".split()


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """20 and 5 pairs, half of them upright: two steps and a half of 8 make an epoch."""
    folder = tmp_path_factory.mktemp("pairs")
    sizes = [(48, 64), (64, 48)]
    train, val = ([pair(seed, *sizes[seed % 2]) for seed in range(*part)] for part in ((0, 20), (50, 55)))
    return write_pairs(folder / "train", train), write_pairs(folder / "val", val)


@pytest.fixture
def run(sets: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def call(out: Path, *more: str, what: str = "random:vit_pico_patch8", code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        argv = [what, "--train", sets[0], "--val", sets[1], "--out", str(out), *SMALL, *more]
        assert program.main(argv) == code
        printed = capsys.readouterr()
        return json.loads(printed.out.splitlines()[-1]) if code == 0 else {"error": printed.err}

    return call


def test_a_training_is_a_run_and_ends_with_the_figures(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run(out)
    log = lines(out)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6, 7]
    assert {"loss", "pixel_accuracy", "images_per_s", "data_wait_ms", "grad_norm"} <= log[0].keys()
    assert log[-1]["loss"] < log[0]["loss"]
    for t, line in enumerate(log):  # poly, from the learning rate itself to 1e-5
        assert line["lr"] == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 - t / 7) ** 0.9)
    assert json.loads((out / "status.json").read_text()) == {"state": "done", "step": 7, "of": 7}
    assert list(found["per_class"]) == NAMES
    assert found["miou"] == pytest.approx(np.mean(list(found["per_class"].values())))
    assert 0 < found["miou"] <= found["localisation_miou"] <= 100
    assert 0 < found["multilabel_map"] <= 100
    assert found["images"] == 5 and found["lr"] == 1e-3 and found["chosen_on"] is None
    before = (out / "log.jsonl").read_bytes()
    assert run(out) == found and (out / "log.jsonl").read_bytes() == before  # there was nothing left to do


def test_it_goes_on_in_mid_epoch_as_if_nothing_had_happened(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    found = run(whole, "--log.checkpoint_every", "3")
    shutil.copytree(whole, stopped)
    (stopped / "result.json").unlink()
    for step in (6, 7):
        (stopped / "checkpoints" / f"step_{step:09d}.pt").unlink()
    assert final(stopped)["step"] == 3 and final(stopped)["loader"]["position"] == 8
    assert run(stopped, "--log.checkpoint_every", "3") == found
    assert_same_run(whole, stopped)


@pytest.mark.slow
def test_stopped_it_says_so_and_scores_nothing(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run(tmp_path / "out", "--stop_after", "0", code=75)
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "stopped"
    assert not (tmp_path / "out" / "result.json").exists()
    assert "miou" in run(tmp_path / "out")


def loca_run(folder: Path, **fields: Any) -> loca.Method:
    """A LOCA run's folder with one checkpoint."""
    views_ = recipes.Loca(size=32, focal_views=0)
    cfg = loca.Config("vit_pico_patch8", hidden=8, prototypes=4, views=views_, **fields)
    torch.manual_seed(5)
    method = loca.Method(cfg)
    with torch.no_grad():
        method.teacher.backbone.pos_embed.add_(1)  # the teacher is what counts
    saved = {"step": 1, "method": "loca", "config": f"loca: {json.dumps(asdict(cfg))}", "model": method.state_dict()}
    checkpoint.save(folder / "checkpoints", saved, keep_last=1, keep_every=None)
    return method


@pytest.mark.parametrize("clusters", ["patch", "cls"])
def test_it_starts_from_the_teacher_with_its_positions_resized_once(tmp_path: Path, clusters: str) -> None:
    teacher = loca_run(tmp_path / "run", clusters=clusters).teacher.backbone
    what = str(tmp_path / "run")
    given = downstream.settings("finetune", what) | {"method": "finetune", "shards": "x", "finetune.views.size": 64}
    downstream.write_start(tmp_path / "start.pt", what, config.resolve(given), size=64)
    first: Any = checkpoint.restore(checkpoint.load(tmp_path / "start.pt"))
    assert first.encoder.num_prefix_tokens == (clusters == "cls") and first.encoder.grid == 8
    grid = teacher.pos_embed.detach().unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, (8, 8), mode="bilinear").flatten(2).mT
    torch.testing.assert_close(first.encoder.pos_embed.detach(), wanted)
    assert first.encoder.pos_embed.requires_grad
    theirs = teacher.state_dict()
    assert_same(
        {k: v for k, v in first.encoder.state_dict().items() if k != "pos_embed"},
        {k: v for k, v in theirs.items() if k != "pos_embed"},
    )
    assert first.head.bias.abs().max() == 0 and first.head.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.slow
def test_from_a_run_on_the_first_step_is_that_backbones(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    loca_run(tmp_path / "run")
    found = run(tmp_path / "out", "--optim.lr", "0", what=str(tmp_path / "run"))  # weights that never move
    assert found["miou"] > 0 and not list((tmp_path / "out").glob("start_*"))
    model = final(tmp_path / "out")["model"]
    teacher = loca_run(tmp_path / "again").teacher.backbone.state_dict()
    assert_same({k: model[f"encoder.{k}"] for k in teacher}, teacher)


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_resnet", "convnext_tiny", "resnet50", "vit_pico_patch16"])
def test_every_kind_of_backbone_learns_from_the_same_loss(name: str) -> None:
    crop = recipes.Segmentation(size=64, short_side=64)
    method = finetune.Method(finetune.Config(name, classes=4, views=crop, stride=64, drop_path=0.0))
    batch = synthetic(finetune.views(method.cfg), 2, "cpu")
    loss, metrics = method(batch, torch.zeros(()))
    assert loss.item() == pytest.approx(math.log(4), rel=0.6) and 0 <= metrics["pixel_accuracy"] <= 1
    loss.backward()
    lacking = [n for n, p in method.named_parameters() if p.grad is None]
    assert lacking == []  # DDP would wait for them


def test_the_loss_is_the_cross_entropy_of_labelled_pixels() -> None:
    torch.manual_seed(0)
    method = finetune.Method(small_network())
    batch = synthetic(finetune.views(method.cfg), 2, "cpu")
    mask = torch.randint(3, (2, 1, 32, 32), dtype=torch.uint8)
    mask[:, :, :10] = VOID
    view = batch.views["image"]
    object.__setattr__(view, "mask", mask)
    method.eval()
    loss, metrics = method(batch, torch.zeros(()))
    with torch.no_grad():
        logits = method.logits(view.tensor()[:, 0])
    up = np.stack([[np.array(Image.fromarray(c).resize((32, 32), Image.Resampling.BILINEAR)) for c in image]
                   for image in logits.numpy()])  # fmt: skip
    p = torch.from_numpy(up).log_softmax(1)
    truth = mask[:, 0].int()
    terms = [-p[b, truth[b, y, x], y, x] for b in range(2) for y in range(10, 32) for x in range(32)]
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)
    right = [p[b, :, y, x].argmax() == truth[b, y, x] for b in range(2) for y in range(10, 32) for x in range(32)]
    assert metrics["pixel_accuracy"].item() == pytest.approx(np.mean(right), abs=2e-3)


def test_the_multi_label_loss_is_that_of_a_layer_on_the_mean_patch() -> None:
    torch.manual_seed(0)
    method = finetune.Method(replace(small_network(), objective="multilabel")).eval()
    batch = synthetic(finetune.views(method.cfg), 2, "cpu")
    view = batch.views["image"]
    mask = torch.full((2, 1, 32, 32), VOID, dtype=torch.uint8)
    mask[0, 0, 3, 5], mask[1, 0, :9], mask[1, 0, 20] = 2, 0, 1
    object.__setattr__(view, "mask", mask)
    loss, metrics = method(batch, torch.zeros(()))
    with torch.no_grad():
        p = method.head(method.encoder(view.tensor()[:, 0]).mean(1)).sigmoid()
    present = [[0, 0, 1], [1, 1, 0]]
    terms = [-math.log(p[b, c] if present[b][c] else 1 - p[b, c]) for b in range(2) for c in range(3)]
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5) and not metrics


@pytest.mark.slow
def test_multi_label_classification_end_to_end(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    more = ["--finetune.objective", "multilabel", "--lr", "1e-6", "1e-3"]
    found = run(tmp_path, *more)
    assert "miou" not in found and "localisation_miou" not in found
    assert found["multilabel_map"] == found["all"][f"lr_{found['lr']:g}_seed_0"] == max(found["all"].values()) <= 100
    assert found["multilabel_map"] == pytest.approx(
        np.mean([ap for ap in found["per_class"].values() if ap is not None])
    )
    log = lines(tmp_path / "lr_0.001_seed_0")
    assert log[-1]["loss"] < log[0]["loss"] < 1 and "pixel_accuracy" not in log[0]


@pytest.mark.slow
def test_the_step_is_one_graph(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "compile_", partial(parallel.compile_, backend="eager"))
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(tmp_path / "out", "--speed.compile", "on")
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


# ---- subsets, sweeps, presets ----------------------------------------------------------------------------------------


class Numbered(Labelled):
    """Names without images."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.shards: Any = type("Keys", (), {"key": staticmethod(lambda i: f"ADE_train_{i:08d}")})

    def __len__(self) -> int:
        return self.count


def test_subsets_are_nested_seeded_and_of_the_published_sizes(tmp_path: Path) -> None:
    data = Numbered(20_210)
    found = {}
    for seed in (0, 1):
        for parts, count in ((32, 631), (16, 1263), (8, 2526), (4, 5052), (2, 10_105)):
            names = program.few(data, Fraction(1, parts), seed, tmp_path).read_text().split()
            assert len(names) == len(set(names)) == count
            found[seed, parts] = set(names)
        assert found[seed, 32] < found[seed, 16] < found[seed, 8] < found[seed, 4] < found[seed, 2]
    assert 5 < len(found[0, 32] & found[1, 32]) < 60  # by chance, 20
    with pytest.raises(ValueError, match="less than one"):
        program.few(Numbered(20), Fraction(1, 32), 0, tmp_path)


def test_a_sweep_over_subsets(run: Callable[..., dict[str, Any]], sets: tuple[str, str], tmp_path: Path) -> None:
    more = ["--lr", "1e-3", "3e-3", "--fraction", "1/2", "--subset", "0", "1", "--steps", "3"]
    found = run(tmp_path, *more)
    names = {f"lr_{lr}_seed_0_subset_0" for lr in ("0.001", "0.003")} | {f"lr_{found['lr']:g}_seed_0_subset_1"}
    assert found["all"].keys() == names and found["runs"] == 2 and found["chosen_on"] == "val"
    best = max((f"lr_{lr}_seed_0_subset_0" for lr in ("0.001", "0.003")), key=found["all"].__getitem__)
    assert best == f"lr_{found['lr']:g}_seed_0_subset_0"
    pair_ = [found["all"][f"lr_{found['lr']:g}_seed_0_subset_{k}"] for k in (0, 1)]
    assert found["miou"] == pytest.approx(np.mean(pair_)) and found["miou_std"] == pytest.approx(np.std(pair_, ddof=1))
    assert found["fraction"] == "1/2"
    listed = (tmp_path / "subset_1_1_of_2.txt").read_text().split()
    chosen = ShardSet(sets[0]).only(listed)
    assert len(listed) == len(chosen) == 10 and {chosen.key(i) for i in range(10)} == set(listed)
    text = (tmp_path / f"lr_{found['lr']:g}_seed_0_subset_1" / "config.yaml").read_text()
    assert "only: " in text and "subset_1_1_of_2.txt" in text


@pytest.mark.parametrize(
    ("more", "what", "reason"),
    [
        (["--fraction", "1/99"], "random:vit_pico_patch8", "less than one"),
        (["--fraction", "2"], "random:vit_pico_patch8", r"lie in \(0, 1\]"),
        (["--fraction", "1/2", "--subset", "-1"], "random:vit_pico_patch8", "--subset -1: a seed"),
        (["--seeds", "0"], "random:vit_pico_patch8", "--seeds"),
        (["--subset", "3"], "random:vit_pico_patch8", "--subset needs --fraction"),
        (["--method", "loca"], "random:vit_pico_patch8", "--method: this program decides it"),
        (["--lr", "1e-4", "nan"], "random:vit_pico_patch8", "--lr nan: it must lie between"),
        (["--finetune.stride", "64"], "random:vit_pico_patch8", "stride is 64.*gaps"),
        ([], "random:vit_pica_patch8", "unknown backbone 'vit_pica_patch8'"),
        (["--finetune.views.size", "36"], "random:vit_pico_patch8", "views.size is 36: .* multiple of 8"),
        ([], "/nowhere", "/nowhere"),
        (["--finetune.vews.size", "64"], "random:vit_pico_patch8", r"did you mean 'finetune\.views\.size'"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(
    run: Callable[..., dict[str, Any]], tmp_path: Path, more: list[str], what: str, reason: str
) -> None:
    import re

    error = run(tmp_path / "out", *more, what=what, code=2)["error"]
    assert re.search(reason, error) and error.count("\n") == 1


@pytest.mark.parametrize("text", ["1/0", "few"])
def test_a_share_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(["WHAT", "--train", "x", "--val", "y", "--out", "z", "--fraction", text])
    assert ended.value.code == 2 and f"'{text}' is not a fraction" in capsys.readouterr().err


PRESET_CLASSES = {
    "finetune": ("ade20k", 150),
    "finetune_bdd10k": ("bdd10k", 19),
    "finetune_camvid": ("camvid32", 32),
    "finetune_cityscapes": ("cityscapes", 19),
    "finetune_idd": ("idd", 26),
    "finetune_isprs": ("isprs", 6),
    "finetune_kitti": ("kitti", 19),
    "finetune_pascal_context": ("pascal_context60", 60),
    "finetune_suim": ("suim", 8),
    "finetune_sunrgbd": ("sunrgbd", 37),
    "finetune_voc": ("voc", 21),
}


def test_every_data_set_has_a_preset() -> None:
    assert {p.stem for p in config.PRESETS.glob("finetune*.yaml")} == PRESET_CLASSES.keys()


@pytest.mark.parametrize(
    "preset", [p if p == "finetune_cityscapes" else pytest.param(p, marks=pytest.mark.slow) for p in PRESET_CLASSES]
)
def test_a_presets_model_is_built_with_the_classes_of_its_layout(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from segmentation.layouts import LAYOUTS

    layout, classes = PRESET_CLASSES[preset]
    settings = config.resolve({"config": preset, "shards": "x"})
    assert settings.method.classes == classes == len(LAYOUTS[layout].classes)
    assert f"layout {layout}" in (config.PRESETS / f"{preset}.yaml").read_text()
    assert settings.run.optim.lr_batch == settings.run.batch_size  # the rate is what it says
    assert settings.run.optim.schedule == "poly" and settings.run.optim.clip is None
    with torch.device("meta"):
        method = methods.load("finetune").Method(settings.method)
    assert method.head.weight.shape == (classes, 768)
    assert method.encoder.pos_embed.shape[1] == (settings.method.views.size // 16) ** 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_ranks_share_the_work(sets: tuple[str, str], run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The same figures as one process, but for rounding; through two trainings, each with a connection of its own."""
    more = ["--lr", "1e-3", "2e-3", "--steps", "3", "--finetune.drop_path", "0"]
    alone = run(tmp_path / "one", *more)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    launch += ["--rdzv-endpoint=localhost:0", "-m", "trainer.finetune", "random:vit_pico_patch8"]
    launch += ["--train", sets[0], "--val", sets[1], "--out", str(tmp_path / "two"), *SMALL, *more]
    done = subprocess.run(
        launch,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["all"].keys() == alone["all"].keys()
    for name, miou in alone["all"].items():
        assert found["all"][name] == pytest.approx(miou, abs=0.3)
