"""bench_loader: the command and its last line, the verdict, comparison, chart; the rivals cut the same views."""

import copy
import json
import runpy
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mapimages
import numpy as np
import pytest
import torch

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.append(str(TOOLS))


def main(words: list[str]) -> int:
    return runpy.run_path(str(TOOLS / "bench_loader.py"))["main"](words)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    members = [
        member
        for k in range(24)
        for member in mapimages.sample(f"{k:04d}", mapimages.encode(mapimages.smooth_image(k, 90, 110), "JPEG"), 0)
    ]
    return str(mapimages.write_tar(folder / "set-train-0000.tar", members).parent)


@pytest.fixture(scope="module")
def results(shards: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("bench")
    printed, given = {}, ["--shards", shards, "--batch-size", "4", "--num-threads", "1", "--seconds", "0.2"]
    for recipe, more in (("decode", []), ("plain", ["--against", "torchvision", "--repeats", "2"])):
        path = out / f"{recipe}.json"
        code = main([*given, "--repeats", "1", "--recipe", recipe, "--json", str(path), *more])
        assert code == 0
        printed[recipe] = json.loads(path.read_text())
    return printed


def test_the_result_holds_what_is_promised(results: dict) -> None:
    for recipe, stages in (
        ("decode", {"read", "decode"}),
        ("plain", {"read", "decode", "draw", "cut", "transfer", "whole loader"}),
    ):
        result = results[recipe]
        assert {"recipe", "device", "batch_size", "num_threads", "images_per_s", "stages"} <= result.keys()
        rate = result["images_per_s"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert set(result["stages"]) == stages
        assert result["latency_ms"]["p50"] <= result["latency_ms"]["p99"] <= result["latency_ms"]["max"]
        assert result["shuffle"].keys() == {"global", "block"} and result["shuffle"]["block"]["shards"] > 0
        assert result["shards"]["images"] == 24 and result["shards"]["mean_pixels"] == 9900
        assert result["machine"]["cores"] >= 1 and result["machine"]["versions"]["torch"]
        assert result["cpu_s_per_1000"]["median"] > 0 and result["verdict"].endswith(".")
    plain = results["plain"]
    assert plain["against"]["torchvision"]["images_per_s"]["median"] > 0
    assert plain["against"]["torchvision"]["ratio"] == pytest.approx(
        plain["images_per_s"]["median"] / plain["against"]["torchvision"]["images_per_s"]["median"], abs=0.01
    )
    assert 0 <= plain["consumer"]["wait_percent"] <= 100 and 50 < plain["memory_mb"]["private"] < 4000


def test_the_last_line_is_the_result(shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--shards", shards, "--batch-size", "4", "--num-threads", "1", "--seconds", "0.1", "--repeats", "1"]
    assert main([*given, "--recipe", "decode"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["recipe"] == "decode" and len(lines) > 5


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--against", "ffcv"], "ffcv"),
        (["--recipe", "decode", "--tune"], "decode"),
        (["--batch-size", "0"], "positive"),
        (["--shards", "/nowhere"], "/nowhere"),
        (["--json", "/nowhere/result.json"], "/nowhere"),
        (["--headspace", "--method", "nope"], "'nope'"),
        (["--headspace", "--backbone", "nope"], "'nope'"),
        (["--seconds", "nan"], "--seconds"),
    ],
)
def test_wrong_usage_is_one_sentence_and_code_2(shards: str, more, word, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shards", shards, "--seconds", "0.1", *more]) == 2
    captured = capsys.readouterr()
    assert word in captured.err and len(captured.err.splitlines()) == 1 and "{" not in captured.out


def test_a_comparison_knows_noise(results: dict) -> None:
    from benchmarking import report

    new, old = results["plain"], copy.deepcopy(results["plain"])
    assert all("+0.0 %, within noise" in line for line in report.compare(new, old))
    whole = new["stages"]["whole loader"]["images_per_s"]
    old["stages"]["whole loader"]["images_per_s"] = {k: v / 3 for k, v in whole.items()}
    changed = [line for line in report.compare(new, old) if line.startswith("whole loader")]
    assert len(changed) == 1 and "+200.0 %" in changed[0]
    assert ("beyond" in changed[0]) == (whole["min"] > whole["max"] / 3)
    assert all("noise unknown" in line for line in report.compare(new | {"repeats": 1}, old))
    for name, other in (("recipe", "decode"), ("batch_size", 7), ("num_threads", 9)):
        with pytest.raises(ValueError, match=str(other)):
            report.comparable(new, old | {name: other})


def test_the_verdict_names_what_limits(results: dict) -> None:
    from benchmarking import report

    result = copy.deepcopy(results["plain"])
    result["machine"] |= {"cores": 4, "load_before": 0.0}
    result |= {"num_threads": 4, "from_storage_percent": 0.0}
    busy = result["stages"]["whole loader"]["cores_busy"]
    busy["median"] = 3.9
    result["stages"]["cut"]["alone_ms"]["median"] = 1e3
    assert "processor" in report.verdict(result) and "cut" in report.verdict(result)
    result["machine"] |= {"cores": 64, "cpu_quota": 4.0}
    assert "processor" in report.verdict(result)
    result["machine"] |= {"cores": 4, "cpu_quota": None}
    result["num_threads"] = 2
    busy["median"] = 2.0
    assert "--num-threads" in report.verdict(result)
    busy["median"] = 0.5
    assert "Waiting" in report.verdict(result)
    result["from_storage_percent"] = 60.0
    assert "Storage" in report.verdict(result)
    result["machine"]["load_before"] = 9.0
    assert "Other programs" in report.verdict(result)


def test_the_chart_is_a_picture(results: dict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarking import report

    report.chart(results["plain"], tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_tuning_finds_the_fastest_of_what_it_tried(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of our own: 3 threads, a batch of 8 and a depth of 4 are fastest; one setting after the other."""
    from benchmarking import stages, sweeps

    from pipeline import Loader, ShardSet, recipes

    made: list[dict] = []

    class Fake:
        def __init__(self, name: str, loader: Loader, settle: int) -> None:
            assert settle > loader._depth
            assert loader._depth == made[-1]["prefetch"] and loader.batch_size == made[-1]["batch_size"]
            self.speed = 3 * made[-1]["num_threads"] + 2 * made[-1]["prefetch"] + made[-1]["batch_size"]

        def turn(self, seconds: float) -> None:
            self.rate = {"median": self.speed, "min": self.speed, "max": self.speed}

        def close(self) -> None:
            pass

    class Task(stages.Task):
        def loader(self, recipe=None, **changes):
            made.append(changes)
            return super().loader(recipe, **changes)

    monkeypatch.setattr(sweeps, "of_loader", Fake)
    said: list[str] = []
    found = sweeps.tune(Task(ShardSet(shards), recipes.plain(size=32), 4, 2), 0.1, said.append)
    assert {k: found["best"][k] for k in ("num_threads", "prefetch", "batch_size")} == {
        "num_threads": 3,
        "prefetch": 4,
        "batch_size": 8,
    }
    assert len(found["table"]) == len(said) == len(made) == 3 + 2 + 2
    assert {row["prefetch"] for row in found["table"]} == {1, 2, 4}


@pytest.mark.parametrize("pixels", ["uint8", "bfloat16"])
@pytest.mark.parametrize("name", ["torchvision", "opencv", "simplejpeg", "simplejpeg-aa"])
def test_rivals_cut_the_same_shapes_and_types(name: str, pixels: str, shards: str) -> None:
    from benchmarking import rivals

    from pipeline import ShardSet, recipes

    packages, build = rivals._RIVALS[name]
    for package in packages:
        pytest.importorskip(package)
    assert build is not None
    for recipe in (recipes.loca("paper", focal_views=1), recipes.vicregl(small=1)):
        kinds = build(recipe, getattr(torch, pixels))(ShardSet(shards).read(3))
        views = [view for kind in kinds for view in (kind if kind.ndim == 4 else [kind])]
        sizes = [c.size for c in recipe.cuts for _ in range(c.count)]
        assert all(str(view.dtype) == f"torch.{pixels}" for view in views)
        if pixels == "uint8":
            assert [sorted(view.shape) for view in views] == [[3, s, s] for s in sizes]
        else:
            assert [tuple(view.shape) for view in views] == [(3, s, s) for s in sizes]
            assert all(-2.2 < view.min() < view.max() < 2.7 for view in views)


def test_an_experts_colours_are_the_recipes(shards: str) -> None:
    """Each operation by OpenCV is what torchvision makes of it, to two levels: no work is left out."""
    cv2 = pytest.importorskip("cv2")
    from benchmarking import by_hand
    from torchvision.transforms import functional

    from pipeline.recipes import Augmentation

    view = mapimages.smooth_image(1, 40, 40)
    exact = torch.from_numpy(view).permute(2, 0, 1).float() / 255
    rng = np.random.default_rng(0)
    for step, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        strength = Augmentation(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)
        state = rng.bit_generator.state
        factor = rng.uniform(-0.1, 0.1) if name == "hue" else rng.uniform(0.7, 1.3)
        rng.bit_generator.state = state
        found = by_hand._jittered(view, step, strength, rng, cv2)
        wanted = getattr(functional, f"adjust_{name}")(exact, factor).permute(1, 2, 0).numpy() * 255
        off = np.abs(found - wanted)
        assert np.median(off) < 2 and np.abs(view - wanted).mean() > 4 * off.mean(), name
    gray, flat = Augmentation(gray=1.0), Augmentation(solarize=1.0)
    assert np.ptp(by_hand._coloured(view, gray, rng, cv2), axis=-1).max() == 0
    assert np.array_equal(by_hand._coloured(view, flat, rng, cv2), np.minimum(view, 255 - view))


@pytest.mark.slow
def test_dalis_graph_makes_batches_of_every_kind(shards: str) -> None:
    from benchmarking import dali_graph, stages

    from pipeline import ShardSet, recipes

    for recipe, pixels in ((recipes.loca("paper", focal_views=1), "uint8"), (recipes.plain(), "float16")):
        steps = dali_graph.batches(stages.Task(ShardSet(shards), recipe, 3, 1, pixels=pixels))
        assert [next(steps) for _ in range(2)] == [3, 3]


def test_all_rivals_have_a_name_together() -> None:
    from benchmarking import rivals

    assert rivals.chosen("all") == ["torchvision", "opencv", "simplejpeg", "simplejpeg-aa", "dali"]
    assert rivals.chosen(" dali, opencv") == ["dali", "opencv"]
    assert rivals.chosen("") == []


def test_the_busiest_single_thread_is_the_one_that_feeds() -> None:
    from benchmarking import meter

    def feed() -> int:
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass
        return 4

    with ThreadPoolExecutor(1, "loader_feeds") as feeder:
        measured = meter.Meter("fed elsewhere", meter.repeat(lambda _: feeder.submit(feed).result()))
        measured.turn(0.05)
    assert 5.0 <= measured.feeding[0] < 6.5  # 20 ms for four images


def test_the_verdict_says_what_a_rate_takes(results: dict) -> None:
    from benchmarking import report

    result = copy.deepcopy(results["plain"])
    result |= {"wanted": 5000.0, "cpu_s_per_1000": {"median": 1.6}, "feeding_ms": {"median": 0.05}}
    text = report.verdict(result)
    assert "1,000 images take 1.60 CPU-seconds (uint8): 5,000 images/s need 8.0 cores" in text
    assert "would bind at 20,000 images/s" in text
    assert result["feeding_ms"]["median"] < 1000 * results["plain"]["cpu_s_per_1000"]["median"]
