"""report.html: its contents, that it loads nothing from elsewhere, and that a browser shows it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer import report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder: 2,000 lines, of which one is torn, with a loss that falls and a probe every hundred."""
    lines = []
    for step in range(1, 2001):
        record = {"step": step, "epoch": 0, "loss": 9.0 / step, "lr": 1e-3, "images_per_s": 100.0, "box_iou": None}
        lines.append(json.dumps(record | ({"knn": step / 4000} if step % 100 == 0 else {})))
    lines[7] = lines[7][:20]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    (tmp_path / "config.yaml").write_text("shards: <b>&amp;\n")
    (tmp_path / "status.json").write_text(json.dumps({"state": "stopped", "step": 2000, "of": 5000}))
    Image.fromarray(np.full((30, 40, 3), 200, np.uint8)).save(tmp_path / "views.png")
    return tmp_path


def test_it_is_one_file_that_says_how_the_run_stands(folder: Path) -> None:
    report.write(folder, ["loca: <1> parameters"])
    text = (folder / "report.html").read_text()
    assert "stopped: step 2,000 of 5,000" in text and "<li>loca: &lt;1&gt; parameters</li>" in text
    assert "shards: &lt;b&gt;&amp;amp;" in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text) and "http" not in text and "<script" not in text
    assert [re.sub("<.*?>", "", h) for h in re.findall("<h2>.*?</h2>", text)] == (
        ["loss", "probe", "optim", "speed", "pictures", "settings"]
    )
    assert "<b>knn</b> 50.0%" in text and "box_iou" not in text  # never finite
    HTMLParser().feed(text)


def test_a_curve_lies_where_its_numbers_are() -> None:
    svg = report.chart("loss", [{"step": step, "loss": value} for step, value in ((10, 0.0), (20, 40.0), (30, 20.0))])
    points = np.array([point.split(",") for point in re.search('points="(.*?)"', svg)[1].split()], float)
    left, right, top, bottom = report.LEFT, report.WIDTH - report.RIGHT, report.TOP, report.HEIGHT - report.BOTTOM
    assert np.allclose(points, [(left, bottom), ((left + right) / 2, top), (right, (top + bottom) / 2)])
    assert re.findall(">([^<>]+)</text>", svg) == ["0", "20", "40", "step 10", "30"]


@pytest.mark.parametrize(
    ("name", "values", "labels"),
    [
        ("ema_momentum", (0.90002, 0.90011), "0.90002 0.90004 0.90006 0.90008 0.90010 0.90012"),
        ("step_ms", (2104.0, 13400.0), "0 5,000 10,000 15,000"),
        ("position_accuracy", (0.0058, 0.0063), "0.56% 0.58% 0.60% 0.62% 0.64%"),
        ("lr", (1e-8, 3e-8), "1e-08 2e-08 3e-08"),
    ],
)
def test_ticks_tell_levels_apart(name: str, values: tuple[float, float], labels: str) -> None:
    svg = report.chart(name, [{"step": k, name: value} for k, value in enumerate(values)])
    assert re.findall('"end">([^<>]+)</text>', svg)[: len(labels.split())] == labels.split()


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 0.0), (0.02, 0.02), (-2e-7, 1e-7), (99.0, 1234.0)])
def test_ticks_are_few_and_enclose(low: float, high: float) -> None:
    ticks = report._ticks(low, high)
    assert ticks[0] <= low and high <= ticks[-1] and 3 <= len(ticks) <= 7


def test_a_long_curve_is_short(folder: Path) -> None:
    svg = report.chart("loss", report.read_log(folder / "log.jsonl"))
    assert svg.count(",") < report.POINTS + 10


@pytest.mark.slow
def test_a_browser_shows_it(folder: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser here")
    report.write(folder, ["a fact"])
    options = "--headless --no-sandbox --disable-gpu --disable-background-networking --window-size=1200,2400"
    command = [browser, *options.split(), f"--user-data-dir={tmp_path}", f"--screenshot={tmp_path / 'shot.png'}"]
    subprocess.run([*command, f"file://{folder / 'report.html'}"], check=True, capture_output=True, timeout=200)
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    blue = (abs(pixels - [0x16, 0x64, 0xC0]).sum(-1) < 40).sum()
    assert blue > 500  # the curves
    assert ((pixels == 200).all(-1)).sum() > 300  # the picture
