"""report.html in a run's folder: state, curves, pictures, machine and settings in one file without network requests."""

import base64
import io
import json
import math
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import host
from trainer.console import in_percent, short
from trainer.metrics import group

POINTS = 400  # most points of a curve; longer curves are averaged
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 360, 190, 54, 22, 10, 10  # sizes of a chart and its margins, in pixels
CAPTIONS = {
    "views": "the views of the first batch after this start, one image per row",
    "placements": "predicted and true places of the queries' patches",
    "segmentation": "frozen segmentation by k-NN",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 1180px; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { border-bottom: 1px solid #ddd; margin-top: 2rem }
.state { color: #666 } .charts { display: flex; flex-wrap: wrap; gap: 14px }
figure { margin: 0 } figcaption { color: #444; font-size: 14px } figcaption b { color: #222 }
svg { background: #fafafa; border: 1px solid #e4e4e4 } svg text { font-size: 11px; fill: #666 }
img { max-width: 100%; border: 1px solid #e4e4e4 } pre { background: #fafafa; padding: 1rem; overflow: auto }
"""


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the records of a log.jsonl. Lines truncated by a crash are skipped."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            found.append(record)
    return found


def write(out: Path, facts: Sequence[str]) -> None:
    """Write report.html from the other files of the run's folder. `facts` are lines about machine, model and data."""
    records, status = read_log(out / "log.jsonl"), host.read_json(out / "status.json") or {}
    title, facts = out.resolve().name, [*facts, _versions()]
    state = f"{status.get('state', 'running')}: step {status.get('step', 0):,} of {status.get('of', 0):,}"
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>',
        f'<h1>{escape(title)}</h1><p class="state">{escape(state)}, {time.strftime("%Y-%m-%d %H:%M %Z")}</p>',
        "<ul>" + "".join(f"<li>{escape(fact)}</li>" for fact in facts) + "</ul>",
        _curves(records),
        _pictures(out),
        "<h2>settings</h2>",
        f"<pre>{escape((out / 'config.yaml').read_text(encoding='utf-8'))}</pre></html>\n",
    ]
    host.write_atomic(out / "report.html", "\n".join(parts).encode())


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in ("dense-ssl", "torch", "numba", "nvidia-dali-cuda130", "timm"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def _curves(records: Sequence[dict[str, Any]]) -> str:
    names = dict.fromkeys(name for record in records for name in record if name not in ("step", "epoch"))
    parts = []
    for heading in ("loss", "probe", "optim", "speed"):
        charts = "".join(chart(name, records) for name in names if group(name) == heading)
        if charts:
            parts.append(f'<h2>{heading}</h2><div class="charts">{charts}</div>')
    return "\n".join(parts)


def chart(name: str, records: Sequence[dict[str, Any]]) -> str:
    """Return a chart of one metric over the steps, as inline SVG; "" if the metric was never finite."""
    known = [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float) and math.isfinite(r[name])]
    if not known:
        return ""
    bins = np.array_split(np.array(known, float), min(POINTS, len(known)))
    steps, values = np.array([part.mean(0) for part in bins]).T
    ticks = _ticks(float(values.min()), float(values.max()))
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    x = LEFT + (steps - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def level(value: Any) -> Any:
        return TOP + (ticks[-1] - value) / (ticks[-1] - ticks[0]) * (HEIGHT - TOP - BOTTOM)

    lines = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level(tick):.1f}" y2="{level(tick):.1f}" stroke="#e4e4e4"/>'
        f'<text x="{LEFT - 5}" y="{level(tick) + 4:.1f}" text-anchor="end">{label}</text>'
        for tick, label in zip(ticks, _labels(ticks, in_percent(name)), strict=True)
    )
    lines += "".join(
        f'<text x="{place:.0f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{what}{known[k][0]:,}</text>'
        for place, anchor, k, what in ((LEFT, "start", 0, "step "), (WIDTH - RIGHT, "end", -1, ""))[: len(known)]
    )
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, level(values), strict=True))
    dot = f'<circle cx="{x[-1]:.1f}" cy="{level(values[-1]):.1f}" r="2.5" fill="#1664c0"/>'
    curve = f'<polyline points="{points}" fill="none" stroke="#1664c0" stroke-width="1.5"/>'
    caption = f"<figcaption><b>{escape(name)}</b> {escape(short(name, known[-1][1]))}</figcaption>"
    return f'<figure>{caption}<svg width="{WIDTH}" height="{HEIGHT}">{lines}{curve}{dot}</svg></figure>'


def _ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers that enclose the range from `low` to `high`."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-30):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next((factor for factor in (5, 2) if (high - low) / (factor * step) >= 2), 1)
    return [k * step for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _labels(ticks: Sequence[float], percent: bool) -> list[str]:
    """Format ticks with enough decimals to tell them apart."""
    scale = 100 if percent else 1
    decimals = max(0, -math.floor(math.log10(scale * (ticks[1] - ticks[0])) + 1e-9))
    form = f",.{decimals}f" if decimals <= 5 else ".4g"
    return [f"{scale * tick + 0.0:{form}}{'%' * percent}" for tick in ticks]


def _pictures(out: Path) -> str:
    parts = []
    for path in sorted(out.glob("*.png")):
        picture = Image.open(path).convert("RGB")
        picture.thumbnail((1180, 4000))
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG", quality=88)
        source = f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
        caption = escape(CAPTIONS.get(path.stem, path.stem))
        parts.append(f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
    return "<h2>pictures</h2>" + "".join(parts) if parts else ""
