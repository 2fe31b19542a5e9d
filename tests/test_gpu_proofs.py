"""Proofs about the GPU's path that need no GPU; docs/gpu.md lists the rest."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h100
import predict_gpu
import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ROOT / "trainer" / "presets"
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: gpu_check measures"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc builds what stands in for CUDA's libraries"),
]


@pytest.fixture(scope="module")
def sees_h100(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return h100.environment(tmp_path_factory.mktemp("h100"))


def predict(environment: dict[str, str], *words: object) -> list[dict[str, Any]]:
    """The lines of a run of predict_gpu.py."""
    command = [sys.executable, str(ROOT / "tests" / "predict_gpu.py"), *(str(word) for word in words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_step_on_an_h100_has_no_wrong_device(sees_h100: dict[str, str], tmp_path: Path) -> None:
    """Both methods' steps in one process, because each start costs seconds; of two blocks, because each block does."""
    small = []
    for method in ("loca", "vicregl"):
        small.append(tmp_path / f"{method}.yaml")
        small[-1].write_text((PRESETS / f"{method}_demo.yaml").read_text().replace("nano", "pico"))
    steps = predict(sees_h100, "--step", *small)
    assert all(step["gflop_per_image"] > 0 and step["gib"]["Total"] > 0 for step in steps)
    assert len(steps) == 2


@pytest.mark.slow
def test_the_views_kernels_have_no_spills(sees_h100: dict[str, str]) -> None:
    """The ceilings are what is reached (docs/gpu.md), a little rounded up."""
    (made,) = predict(sees_h100, "--views")
    for name, kernel in made["kernels"].items():
        assert kernel["spilled"] == 0 and kernel["registers"] <= 64, name  # so that 8 blocks of 128 threads share an SM
    assert len(made["kernels"]) == 4
    ceilings = {"LOCA": (3.6, 6.0), "LOCA, paper": (5.3, 9.8), "VICRegL": (4.7, 14.0), "VICRegL, ResNet-50": (2.6, 7.0)}
    for name, (megabytes, microseconds) in ceilings.items():
        found = made["recipes"][name]
        assert found["megabytes"] <= megabytes and found["microseconds"] <= microseconds, name


def steps() -> list[str]:
    """The presets whose step is unlike those of the others: they may differ in length, schedule and data."""
    found: dict[str, str] = {}
    for path in sorted(PRESETS.glob("*.yaml")):
        settings = yaml.safe_load(path.read_text())
        if "GFLOP an image" in path.read_text():  # it is meant for GPUs
            settings["batch_size"] //= predict_gpu.ranks(path)
            step = {key: value for key, value in settings.items() if key not in ("epochs", "optim", "log")}
            found.setdefault(json.dumps(step, sort_keys=True), path.stem)
    return sorted(found.values())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("preset", steps())
def test_every_presets_step_at_its_size(sees_h100: dict[str, str], preset: str) -> None:
    (found,) = predict(sees_h100, "--step", PRESETS / f"{preset}.yaml")
    print(json.dumps(found))  # with -rP, the lines of docs/gpu.md's table
    assert found["gib"]["Total"] < 76  # of 80 GB, less what CUDA and DALI hold
    said = re.search(r"([\d,]+) GFLOP an image", (PRESETS / f"{preset}.yaml").read_text())
    assert said and float(said[1].replace(",", "")) == pytest.approx(found["gflop_of_method"], rel=0.01)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("preset", ["loca", "vicregl_demo", "vicregl", "vicregl_resnet50_100ep"])
def test_the_step_is_one_graph_on_an_h100(sees_h100: dict[str, str], preset: str) -> None:
    (alone,), (among,) = (predict(sees_h100, "--graphs", PRESETS / f"{preset}.yaml", "--ranks", n) for n in (1, 8))
    print(json.dumps(among))  # with -rP, the numbers of docs/gpu.md
    assert alone["graphs"] == among["graphs"] == 1
    assert alone["breaks"] == among["breaks"] == 0
    assert alone["collectives"] == 0 < among["collectives"]
    assert among["graphs_in_ddp"] > 1  # DDP splits it at its buckets, so that the all-reduce overlaps the backward pass
