"""Terminal output of a run: a progress bar on a terminal, a line every 30 seconds elsewhere, and a final summary."""

import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

PAUSE = 30.0  # seconds between two lines without a terminal, where output is read later
PROBES = ("knn", "segment_miou")  # rare metrics: a record with one of them is always printed


class Console:
    """Shows the progress of a run from step `start` to `total`, with `headline_metrics` in each line."""

    def __init__(self, start: int, total: int, headline_metrics: Sequence[str]) -> None:
        self._total, self._headline_metrics = total, headline_metrics
        terminal = all(stream and stream.isatty() for stream in (sys.stdout, sys.stderr))  # None: closed by a shell
        form = "{percentage:3.0f}% |{bar:20}| {desc}"
        self._bar = tqdm(total=total, initial=start, bar_format=form, dynamic_ncols=True, disable=not terminal)
        self._seconds, self._lines, self._pending, self._due = 0.0, 0, "", 0.0

    def step(self) -> None:
        """Advance the progress bar by one step."""
        self._bar.update()

    def line(self, record: dict[str, Any]) -> None:
        """Show a short form of `record`, which has at least step, epoch, loss and step_ms."""
        seconds = record["step_ms"] / 1e3
        self._lines += 1
        # The first line's steps include compilation and filling buffers: the second line replaces their time.
        self._seconds = seconds if self._lines <= 2 else 0.7 * self._seconds + 0.3 * seconds
        text, probed = self._text(record), any(name in record for name in PROBES)
        if not self._bar.disable:
            self._bar.set_description_str(text)
            if probed:
                self._bar.write(text)
        elif self._lines == 1 or probed or time.monotonic() >= self._due or record["step"] == self._total:
            _say(text)
            self._pending, self._due = "", time.monotonic() + PAUSE
        else:
            self._pending = text

    def _text(self, record: dict[str, Any]) -> str:
        shown = ["loss", *self._headline_metrics, *PROBES]
        parts = [f"step {record['step']:,}/{self._total:,}", f"epoch {record['epoch'] + 1}"]
        parts += [f"{name} {short(name, record[name])}" for name in shown if name in record]
        parts += [f"{name} {record[name]}" for name in ("skipped", "bad_samples") if record.get(name)]
        if "images_per_s" in record:
            parts.append(f"{record['images_per_s']:.3g} images/s")
        minutes = round((self._total - record["step"]) * self._seconds / 60)
        return "  ".join([*parts, f"{minutes // 60}:{minutes % 60:02d} h left"])

    def close(self) -> None:
        self._bar.close()
        if self._pending:
            _say(self._pending)
            self._pending = ""


def _say(text: str) -> None:
    """Print a line. A closed pipe or a full disk behind the output costs the line, not the run."""
    with suppress(OSError):
        print(text, flush=True)


def short(name: str, value: float) -> str:
    """Format a metric for people: accuracies and mIoU in percent, others with four significant digits."""
    if name == "segment_miou":
        return f"{value:.1f}%"
    return f"{value:.1%}" if in_percent(name) else f"{value:.4g}"


def in_percent(name: str) -> bool:
    """Return whether the metric `name` is a fraction from 0 to 1 that is shown in percent."""
    return name == "knn" or name.endswith("accuracy")


def summary(out: Path, state: str, records: Sequence[dict[str, Any]], seconds: float) -> str:
    """Return a summary of the run's results and files, and the commands to run next."""
    folder, last = shlex.quote(str(out)), records[-1] if records else {}
    minutes, rest = divmod(round(seconds), 60)
    lines = [f"{state} at step {last.get('step', 0):,} after {minutes // 60}:{minutes % 60:02d}:{rest:02d} hours"]
    changes = []
    for name in last:
        values = [r[name] for r in records if isinstance(r.get(name), float) and math.isfinite(r[name])]
        if values and (name in PROBES or name.endswith(("loss", "accuracy"))):
            before = f"{short(name, values[0])} -> " if len(values) > 1 else ""
            changes.append(f"{name} {before}{short(name, values[-1])}")
    lines += [f"  {change}" for change in changes]
    lines.append(f"  {folder}/: checkpoints/last, report.html, log.jsonl, config.yaml")
    if state != "done":
        ranks, here = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        launcher = f"torchrun --nproc_per_node={here}" if "TORCHELASTIC_RUN_ID" in os.environ else "python"
        again = f"{launcher} trainer/run.py --out {folder}" if ranks == here else "the same command on every machine"
        return "\n".join([*lines, "resume with", f"  {again}"])
    return "\n".join(
        [
            *lines,
            "next steps",
            f"  python -m trainer.segment {folder} --train SPEC --val SPEC     # frozen segmentation: mIoU",
            f"  python -m trainer.evaluate {folder} --train SPEC --val SPEC    # k-NN and linear probe",
            f"  python -m trainer.export {folder} exported                     # for timm.create_model",
        ]
    )


def counting(title: str | None, images: Iterable[Any] | None = None, **options: Any) -> Any:
    """Return a tqdm bar that counts images. It is hidden without a title, and rarely redrawn without a terminal."""
    pause = 0.1 if sys.stderr.isatty() else PAUSE
    options |= {"mininterval": pause, "maxinterval": max(10.0, pause), "disable": not title}
    return tqdm(images, title, unit=" images", **options)


@contextmanager
def informing(what: str) -> Iterator[None]:
    """Guard optional output, named `what`: if the block fails, print the reason and continue the run without it."""
    try:
        yield
    except Exception as error:
        print(f"run.py: no {what}: {' '.join(str(error).split())}", file=sys.stderr)
