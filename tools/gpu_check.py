"""Checks every claim that needs a GPU, and writes the figures down. One command, no installation:

    PYTHONPATH=. python3 tools/gpu_check.py --out DIR [--shards SPEC] [--quick]

Without --shards it makes its own: smooth random pictures of ImageNet's usual size, packed as WebDataset tars. Writes
DIR/gpu_check.json and DIR/gpu_check.md. Exit code 0 if every check passed, 1 if one did not, 2 if there is no GPU.
"""

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from pipeline import Loader, Recipe, ShardSet, recipes  # noqa: E402
from trainer import methods, optim  # noqa: E402

CHECKS: list[Callable[["Bench"], dict[str, Any]]] = []
RECIPES: dict[str, Callable[[], Recipe]] = {"loca": recipes.loca, "vicregl": recipes.vicregl}
PIXEL_MEAN, PIXEL_SHARE = 1.5, 0.02  # levels of mean difference; share of pixels that may differ by more than 16 levels


class Bench:
    """What the checks share: the shards, a folder for scratch files, and how long they may take."""

    def __init__(self, shards: str, scratch: Path, quick: bool) -> None:
        self.shards, self.scratch, self.quick = shards, scratch, quick
        self.set = ShardSet(shards)

    def loader(self, recipe: str, batch: int, device: str, **settings: Any) -> Loader:
        return Loader(self.set, RECIPES[recipe](), batch, device=device, **settings)


def check(function: Callable[[Bench], dict[str, Any]]) -> Callable[[Bench], dict[str, Any]]:
    """Registers a check: it returns its figures, and fails by raising AssertionError with a sentence."""
    CHECKS.append(function)
    return function


@check
def windows_are_equal_and_pixels_close(bench: Bench) -> dict[str, Any]:
    """CPU and GPU: the same samples, windows bit for bit, pixels within the tolerance."""
    figures: dict[str, Any] = {}
    for name in RECIPES:
        host, device = (bench.loader(name, 32, d, seed=3) for d in ("cpu", "cuda"))
        for a, b, _ in zip(host, device, range(4), strict=False):
            assert torch.equal(a.index, b.index), f"{name}: other samples on the GPU"
            for kind, view in a.views.items():
                assert torch.equal(view.window, b.views[kind].window.cpu()), f"{name}/{kind}: windows differ"
                difference = (view.pixels.int() - b.views[kind].pixels.cpu().int()).abs().float()
                found = figures.setdefault(f"{name}/{kind}", {"mean_levels": 0.0, "share_over_16": 0.0})
                found["mean_levels"] = max(found["mean_levels"], difference.mean().item())
                found["share_over_16"] = max(found["share_over_16"], (difference > 16).float().mean().item())
            for target, values in a.targets.items():
                assert torch.equal(values, b.targets[target].cpu()), f"{name}: targets of {target} differ"
        host.close()
        device.close()
    for kind, found in figures.items():
        assert found["mean_levels"] <= PIXEL_MEAN, (
            f"{kind}: pixels differ by {found['mean_levels']:.2f} levels on average"
        )
        assert found["share_over_16"] <= PIXEL_SHARE, (
            f"{kind}: {found['share_over_16']:.1%} of the pixels differ by > 16"
        )
    return figures


@check
def outputs_stay_valid(bench: Bench) -> dict[str, Any]:
    """A batch that is held keeps its pixels while later ones are made."""
    loader = bench.loader("loca", 32, "cuda")
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch, _ in zip(loader, range(8), strict=False):
        pixels = batch.views["query"].pixels
        held.append((pixels, pixels.clone()))
    torch.cuda.synchronize()
    loader.close()
    assert all(torch.equal(a, b) for a, b in held), "a held batch was overwritten"
    return {"batches_held": len(held)}


@check
def loader_throughput(bench: Bench) -> dict[str, Any]:
    """Source images a second with all views, over the share of the hardware JPEG engines."""
    figures: dict[str, Any] = {"threads": len(os.sched_getaffinity(0))}
    for name in RECIPES:
        for share in (0.0, 0.65) if bench.quick else (0.0, 0.1, 0.25, 0.5, 0.65, 0.8, 1.0):
            loader = bench.loader(name, 128, "cuda", hw_decoder_load=share)
            rates = _rates(loader, steps=10 if bench.quick else 40, repeats=3)
            loader.close()
            figures[f"{name} hw={share}"] = {
                "images_per_s": round(float(np.median(rates))),
                "min": round(min(rates)),
                "max": round(max(rates)),
            }
    return figures


@check
def one_compiled_graph(bench: Bench) -> dict[str, Any]:
    """Each method's step: one graph, nothing recompiled after the second step, no wait for the device."""
    figures = {}
    for name in methods.names():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        room = methods.load(name)
        config = room.Config()
        method = room.Method(config).cuda()
        optimizer = torch.optim.AdamW(method.parameter_groups(0.1), lr=1e-4, fused=True)
        method.compile(dynamic=False)
        loader = Loader(bench.set, room.views(config), 64, device="cuda")
        times = []
        progress = torch.zeros((), device="cuda")
        for step, batch in zip(range(8), _forever(loader), strict=False):
            if step == 3:
                graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                torch.cuda.set_sync_debug_mode("error")
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            progress.fill_(step / 8)
            with torch.autocast("cuda", torch.bfloat16):
                loss, _ = method(batch.to("cuda"), progress)
            loss.backward()
            norm = optim.clip_([p for p in method.parameters() if p.requires_grad], 1.0)
            optim.step(optimizer, torch.isfinite(norm), torch.amp.GradScaler("cuda", enabled=False))
            optimizer.zero_grad(set_to_none=True)
            method.after_step(progress)
            end.record()
            times.append((start, end))
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        loader.close()
        after = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert after == graphs, f"{name}: {after - graphs} graphs were compiled after step 3"
        assert graphs == 1, f"{name}: {graphs} graphs instead of one"
        assert torch.isfinite(loss).item(), f"{name}: the loss is not finite"
        step_ms = float(np.median([a.elapsed_time(b) for a, b in times[4:]]))
        figures[name] = {
            "graphs": graphs,
            "step_ms_batch_64": round(step_ms, 1),
            "images_per_s": round(64e3 / step_ms),
            "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        }
        del method, optimizer
        torch.cuda.empty_cache()
    return figures


@check
def a_short_training(bench: Bench) -> dict[str, Any]:
    """`run.py` in bf16, compiled: the loss falls, the loader is not waited for, the run resumes."""
    out = bench.scratch / "run"
    steps = 60 if bench.quick else 300
    command = [
        sys.executable,
        str(ROOT / "trainer/run.py"),
        "--method",
        "loca",
        "--shards",
        bench.shards,
        "--out",
        str(out),
    ]
    command += [
        "--batch_size",
        "64",
        "--loca.backbone",
        "vit_small_patch16",
        "--log.every",
        "20",
        "--log.tensorboard",
        "false",
    ]
    command += ["--optim.warmup_epochs", "0.5"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    for length in (steps // 2, steps):
        done = subprocess.run(
            [*command, "--steps", str(length)], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"run.py ended with {done.returncode}: {done.stderr[-2000:]}"
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == steps, "the second call did not go on"
    assert lines[-1]["position_loss"] < lines[0]["position_loss"], "the position loss did not fall"
    keys = ("loss", "position_loss", "position_accuracy", "images_per_s", "step_ms", "data_wait_ms", "memory_gb")
    return {"first": {k: lines[0][k] for k in keys}, "last": {k: lines[-1][k] for k in keys}}


def _rates(loader: Loader, steps: int, repeats: int) -> list[float]:
    batches = _forever(loader)
    for _ in range(5):
        next(batches)
    rates = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        seen = 0
        for _ in range(steps):
            seen += next(batches).label.shape[0]
        torch.cuda.synchronize()
        rates.append(seen / (time.perf_counter() - start))
    return rates


def _forever(loader: Loader) -> Any:
    while True:
        yield from loader


def make_shards(folder: Path, count: int) -> str:
    """`count` smooth random pictures, mostly 500x375, some 107 kB each, as tars of 500. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    originals = []
    for _ in range(64):  # pictures differ by their crops; drawing each anew would take minutes
        octaves = [
            np.asarray(
                Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).resize(
                    (700, 600), Image.Resampling.BICUBIC
                ),
                dtype=np.float32,
            )
            for h, w in ((3, 4), (12, 14), (48, 56), (150, 175), (600, 700))
        ]
        weights = np.array([0.5, 0.25, 0.15, 0.1, 0.08], dtype=np.float32)
        originals.append(
            np.clip(np.tensordot(weights / weights.sum(), np.stack(octaves), 1) * 1.6 - 76, 0, 255).astype(np.uint8)
        )
    for first in range(0, count, 500):
        with tarfile.open(folder / f"check-train-{first // 500:04d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(first, min(first + 500, count)):
                h, w = ((375, 500), (500, 375), (333, 500), (480, 640))[i % 4]
                y, x = rng.integers(0, 600 - h + 1), rng.integers(0, 700 - w + 1)
                buffer = io.BytesIO()
                Image.fromarray(originals[i % 64][y : y + h, x : x + w]).save(buffer, "JPEG", quality=92)
                for suffix, data in (("jpg", buffer.getvalue()), ("cls", str(i % 10).encode())):
                    member = tarfile.TarInfo(f"picture_{i:06d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(folder)


def machine() -> dict[str, Any]:
    import nvidia.dali

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dali": nvidia.dali.__version__,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", help="JPEG shards to use in place of made ones")
    parser.add_argument("--quick", action="store_true", help="fewer repeats: two minutes instead of eight")
    parser.add_argument("--only", help="run the checks whose name contains this")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: no GPU that torch can use", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "checks": {}}
    with tempfile.TemporaryDirectory() as scratch:
        shards = args.shards or make_shards(Path(scratch) / "shards", 1500 if args.quick else 6000)
        bench = Bench(shards, Path(scratch), args.quick)
        for function in CHECKS:
            if args.only and args.only not in function.__name__:
                continue
            start = time.perf_counter()
            try:
                result = {"passed": True, "figures": function(bench)}
            except Exception as error:  # the other checks still have something to say
                torch.cuda.set_sync_debug_mode("default")
                result = {"passed": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            result["seconds"] = round(time.perf_counter() - start, 1)
            report["checks"][function.__name__] = result
            print(
                f"{'ok    ' if result['passed'] else 'FAILED'} {function.__name__} ({result['seconds']} s)", flush=True
            )
            print(json.dumps(result.get("figures", result.get("error")), indent=1), flush=True)
            (args.out / "gpu_check.json").write_text(json.dumps(report, indent=1))
    (args.out / "gpu_check.md").write_text(table(report))
    return 0 if all(result["passed"] for result in report["checks"].values()) else 1


def table(report: dict[str, Any]) -> str:
    lines = [
        " ".join(f"{k} {v}" for k, v in report["machine"].items()),
        "",
        "| check | passed | figures |",
        "|---|---|---|",
    ]
    for name, result in report["checks"].items():
        figures = json.dumps(result.get("figures", result.get("error"))).replace("|", "/")
        lines.append(f"| {name.replace('_', ' ')} | {'yes' if result['passed'] else 'NO'} | {figures} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
