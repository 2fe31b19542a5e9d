"""Benchmark of the VICRegL loss against a direct transcription: forward and backward time, values, gradients, memory.

    python tests/bench_vicregl_loss.py [--batch 128] [--width 64] [--expander 256] [--threads 2] [--repeats 5]

Both forms take turns in one process; the best of the repeats counts. Peak memory is measured in a fresh process for
each form, minus the memory in use before the loss.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import oracles_vicregl as oracle

from pipeline.correspondence import pair_matches
from pipeline.windows import from_boxes
from trainer.methods.vicregl import Config, Objective


def problem(batch: int, width: int, expander: int):
    """Cells and embeddings of 2 large and 6 small views, and their windows."""
    rng = np.random.default_rng(0)

    def windows(count: int, low: float, high: float) -> np.ndarray:
        area, ratio = (
            rng.uniform(low, high, (batch, count)) * 375 * 500,
            np.exp(rng.uniform(-0.28, 0.28, (batch, count))),
        )
        h, w = np.minimum(np.sqrt(area / ratio), 375), np.minimum(np.sqrt(area * ratio), 500)
        y, x = rng.random((batch, count)) * (375 - h), rng.random((batch, count)) * (500 - w)
        return from_boxes(np.stack([y, x, h, w], -1), rng.random((batch, count)) < 0.5)

    torch.manual_seed(0)
    cells = torch.randn(batch, 1, width) + 0.5 * torch.randn(batch, 2 * 49 + 6 * 9, width)
    embeddings = torch.randn(batch, 1, expander) + 0.5 * torch.randn(batch, 8, expander)
    return cells, embeddings, windows(2, 0.4, 1.0), windows(6, 0.08, 0.4)


def ours(cells, embeddings, large, small, feature_gamma):
    cfg = Config(feature_gamma=feature_gamma)
    objective = Objective(cfg)
    located = torch.from_numpy(pair_matches(large, small))

    def loss(cells, embeddings):
        together, local = objective.global_loss(embeddings), objective.local_loss(cells, located)
        return cfg.alpha * together["loss"] + (1 - cfg.alpha) * local["loss"]

    return loss


def centres(window, grid):
    """As `pipeline.feature_locations`, in float64: rounding would decide other ties than the exact kernels."""
    y0, x0, y1, x1 = torch.from_numpy(window).double().unbind(1)
    steps = (torch.arange(grid) + 0.5) / grid
    rows, columns = y0[:, None] + steps * (y1 - y0)[:, None], x0[:, None] + steps * (x1 - x0)[:, None]
    return torch.stack([rows[:, :, None].expand(-1, -1, grid), columns[:, None].expand(-1, grid, -1)], 3).flatten(1, 2)


def transcribed(cells, embeddings, large, small, feature_gamma):
    places = [centres(w, 7) for w in large.swapaxes(0, 1)] + [centres(w, 3) for w in small.swapaxes(0, 1)]
    sizes = [49, 49, *[9] * 6]

    def loss(cells, embeddings):
        local = oracle.local_loss(cells.split(sizes, 1), places, 2, (20, 4), feature_gamma or (None, None))
        return 0.75 * oracle.global_loss(embeddings.unbind(1), 2).sum() + 0.25 * local.sum()

    return loss


def run(loss, cells, embeddings):
    cells, embeddings = cells.clone().requires_grad_(), embeddings.clone().requires_grad_()
    start = time.perf_counter()
    value = loss(cells, embeddings)
    value.backward()
    return time.perf_counter() - start, value.detach(), cells.grad, embeddings.grad


def peak_mb() -> float:
    """Of this process; getrusage would tell the parent's, which lives on through exec."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def difference(a, b) -> float:
    return float((a - b).norm() / b.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=64, help="of the local projector")
    parser.add_argument("--expander", type=int, default=256, help="width of the embeddings")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=["ours", "transcribed"], help=argparse.SUPPRESS)
    parser.add_argument("--feature-gamma", choices=["top", "all"], default="all", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = problem(args.batch, args.width, args.expander)
    forms = {"ours": ours, "transcribed": transcribed}
    if args.memory_of:
        small = problem(4, args.width, args.expander)
        run(forms[args.memory_of](*small, None), *small[:2])  # libraries load and compile
        before = peak_mb()
        run(forms[args.memory_of](*data, (20, 4) if args.feature_gamma == "top" else None), *data[:2])
        print(peak_mb() - before)
        return
    for name, gamma in (("all", None), ("top", (20, 4))):
        losses = {form: make(*data, gamma) for form, make in forms.items()}
        times = {form: [] for form in forms}
        for _ in range(args.repeats + 1):
            results = {form: run(loss, *data[:2]) for form, loss in losses.items()}
            for form in forms:
                times[form].append(results[form][0])
        seconds = {form: min(t[1:]) for form, t in times.items()}
        memory = {
            form: float(
                subprocess.check_output(
                    [sys.executable, *sys.argv, "--memory-of", form, "--feature-gamma", name], text=True
                )
            )
            for form in forms
        }
        mine, theirs = results["ours"], results["transcribed"]
        line = {
            "features": name,
            "batch": args.batch,
            "width": args.width,
            "expander": args.expander,
            "threads": args.threads,
            "ours_ms": round(1e3 * seconds["ours"], 1),
            "transcribed_ms": round(1e3 * seconds["transcribed"], 1),
            "ratio": round(seconds["transcribed"] / seconds["ours"], 2),
            "ours_mb": round(memory["ours"]),
            "transcribed_mb": round(memory["transcribed"]),
            "value_difference": float((mine[1] - theirs[1]).abs() / theirs[1].abs()),
            "cells_gradient_difference": difference(mine[2], theirs[2]),
            "embeddings_gradient_difference": difference(mine[3], theirs[3]),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
