"""Checks every claim that needs a GPU, and writes the figures down. One command, no installation:

    PYTHONPATH=. python3 tools/gpu_check.py --out DIR [--shards SPEC] [--quick] [--minutes 10]

Without --shards it makes its own: smooth random pictures of ImageNet's usual size, packed as WebDataset tars. Each
check runs in a process of its own with a limit of time, so that a crash or a hang costs the others nothing, and what it
found before is kept. They stand in the order of what they are worth: --minutes ends the last of them, not the first.
Writes DIR/gpu_check.json and DIR/gpu_check.md after each. Exit code 0 if every check passed, 1 if one did not,
2 if there is no GPU or a package is missing.
"""

import argparse
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# By the module that is imported. What only some checks need costs those alone.
MODULES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "nvidia.dali": "nvidia-dali-cuda130",
    "timm": "timm",
    "numba": "numba",
    "numpy": "numpy",
    "PIL": "pillow",
    "yaml": "pyyaml",
}
SOME_NEED = {
    "a_short_training": {"jsonargparse": "jsonargparse[signatures]", "tqdm": "tqdm"},
    "marked_tests": {"pytest": "pytest", "hypothesis": "hypothesis"},
}


def missing(modules: dict[str, str]) -> list[str]:
    """The packages whose modules cannot be found, without importing any."""
    found = []
    for module, package in modules.items():
        parents = module.split(".")[:-1]
        if any(find_spec(parent) is None for parent in parents) or find_spec(module) is None:
            found.append(package)
    return found


if absent := missing(MODULES):
    print(f"gpu_check: missing packages: pip install {' '.join(absent)}", file=sys.stderr)
    raise SystemExit(2)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from PIL import Image  # noqa: E402

from pipeline import Batch, Loader, Recipe, recipes  # noqa: E402
from pipeline.graph import Form  # noqa: E402
from trainer import cost, methods, parallel  # noqa: E402
from trainer.step import TrainingStep  # noqa: E402

CHECKS: dict[str, Callable[["Bench"], None]] = {}
RECIPES: dict[str, Callable[[], Recipe]] = {"loca": recipes.loca, "vicregl": recipes.vicregl}
PIXEL_MEAN, PIXEL_SHARE = 1.5, 0.02  # levels of mean difference; share of pixels that may differ by more than 16 levels
GOALS = {"loca": 5000, "vicregl": 6000}  # images a second on an H100 with 16 cores
MINUTES = 8.0  # for one check, at most
PACKAGES = ("torch", "triton", "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "timm", "numba", "numpy")


@dataclass
class Bench:
    """What a check works with: shards, a device, a folder for scratch files, and where its figures are written."""

    shards: str
    device: str
    scratch: Path
    quick: bool
    result: Path
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gpu = self.device.startswith("cuda")
        self.batch = 64 if self.gpu else 8
        self.forms: tuple[Form, ...] = get_args(Form) if self.gpu else ("fused",)

    def loader(self, recipe: Recipe, device: str | None = None, **settings: Any) -> Loader:
        return Loader(self.shards, recipe, self.batch, device=device or self.device, **settings)

    def note(self, name: str, figure: Any) -> None:
        """Keeps a figure, whatever happens next."""
        self.figures[name] = figure
        self.write(passed=False, error="it did not come to its end")

    def write(self, **outcome: Any) -> None:
        self.result.write_text(json.dumps({**outcome, "figures": self.figures}))

    def synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def forbid_waiting(self, forbidden: bool) -> None:
        """Whether an operation of torch that makes the host wait for the device is an error."""
        if self.gpu:
            torch.cuda.set_sync_debug_mode("error" if forbidden else "default")

    def config(self, room: Any) -> Any:
        """A method's own settings; those of its small run where there is no GPU."""
        if self.gpu:
            return room.Config()
        name = room.__name__.rpartition(".")[2]
        return methods.config(name, yaml.safe_load((ROOT / f"trainer/presets/{name}_demo.yaml").read_text())[name])


def check(function: Callable[[Bench], None]) -> Callable[[Bench], None]:
    """Registers a check: it notes its figures, and fails by raising AssertionError with a sentence."""
    CHECKS[function.__name__] = function
    return function


@check
def windows_are_equal_and_pixels_close(bench: Bench) -> None:
    """CPU and GPU, each form: the same samples, windows bit for bit, pixels within the tolerance."""
    apart = []
    for name, make in RECIPES.items():
        for form in bench.forms:
            host, device = bench.loader(make(), "cpu", seed=3), bench.loader(make(), seed=3, form=form)
            found: dict[str, dict[str, float]] = {}
            for a, b, _ in zip(host, device, range(2), strict=False):
                assert torch.equal(a.index, b.index), f"{name}, {form}: other samples on the GPU"
                for kind, view in a.views.items():
                    assert torch.equal(view.window, b.views[kind].window.cpu()), (
                        f"{name}/{kind}, {form}: windows differ"
                    )
                    difference = (view.pixels.int() - b.views[kind].pixels.cpu().int()).abs().float()
                    worst = found.setdefault(kind, {"mean_levels": 0.0, "share_over_16": 0.0})
                    worst["mean_levels"] = max(worst["mean_levels"], difference.mean().item())
                    worst["share_over_16"] = max(worst["share_over_16"], (difference > 16).float().mean().item())
                for target, values in a.targets.items():
                    assert torch.equal(values, b.targets[target].cpu()), f"{name}, {form}: targets of {target} differ"
            device.close()
            for kind, worst in found.items():
                bench.note(f"{name}/{kind} {form}", worst)
                if worst["mean_levels"] > PIXEL_MEAN or worst["share_over_16"] > PIXEL_SHARE:
                    apart.append(f"{name}/{kind} {form}")
    assert not apart, f"pixels differ by more than {PIXEL_MEAN} levels, or too many by 16: {', '.join(apart)}"


@check
def loader_throughput(bench: Bench) -> None:
    """Source images a second with all views: the forms against each other, over the share of the JPEG engines."""
    bench.note("threads", len(os.sched_getaffinity(0)))
    shares = (0.65,) if bench.quick else (0.65, 0.0, 0.25, 0.5, 0.8, 1.0)  # DALI's own first: all forms with it
    for share in shares:
        for name, make in RECIPES.items():
            for form in bench.forms:
                if form == "fused" and share != shares[0]:
                    continue  # the CPU decodes
                loader = Loader(
                    bench.shards, make(), 2 * bench.batch, device=bench.device, hw_decoder_load=share, form=form
                )
                rates = _rates(bench, loader, steps=10 if bench.quick else 40, repeats=3)
                loader.close()
                figure = {
                    "images_per_s": round(float(np.median(rates))),
                    "min": round(min(rates)),
                    "max": round(max(rates)),
                }
                bench.note(f"{name} {form} hw={share}", figure)
    for name in RECIPES:
        found = {key: v["images_per_s"] for key, v in bench.figures.items() if key.startswith(f"{name} ")}
        best = max(found, key=lambda key: found[key])
        bench.note(f"fastest of {name}", best)
        goal = GOALS[name] if bench.gpu and "H100" in torch.cuda.get_device_name() else 0
        assert found[best] >= goal, f"{name}: {found[best]} images a second, not {goal}"


@check
def one_compiled_graph(bench: Bench) -> None:
    """Pretraining's steps: one graph, nothing compiled after the second step, no wait for the device; rate and MFU."""
    failed = []
    pretraining = [name for name in methods.names() if (ROOT / f"trainer/presets/{name}_demo.yaml").exists()]
    for name in [*pretraining, *(["vicregl resnet50"] if bench.gpu else [])]:
        try:
            bench.note(name, _train(bench, *name.split()))
        except Exception as error:  # the other methods still have something to say
            traceback.print_exc()
            failed.append(f"{name}: {type(error).__name__}: {error}")
        finally:
            bench.forbid_waiting(False)
    assert not failed, "; ".join(failed)


def _train(bench: Bench, name: str, backbone: str | None = None) -> dict[str, Any]:
    room = methods.load(name)
    config = room.Config(backbone=backbone, drop_path=0.0) if backbone else bench.config(room)
    method = room.Method(config).to(bench.device)
    flops = cost.estimate(lambda: room.Method(config), room.views(config), 4, bench.device).flops_per_image
    optimizer = torch.optim.AdamW(method.parameter_groups(0.1), lr=1e-4, fused=True)
    method.compile(dynamic=False)
    training_step = TrainingStep(method, optimizer, amp_dtype=torch.bfloat16, clip=1.0)
    loader = bench.loader(room.views(config))
    batches = loader.forever()
    for _ in range(2):
        next(batches)  # the loader's own graphs, of the colours, are compiled here
    progress = torch.zeros((), device=bench.device)
    counters = torch._dynamo.utils.counters
    counters.clear()
    start = 0.0
    marks = [_mark(bench)]
    for step in range(60 if bench.gpu else 12):
        if step == 4:
            graphs = counters["stats"]["unique_graphs"]
            bench.synchronize()
            start = time.perf_counter()
            bench.forbid_waiting(True)
        progress.fill_(step / 12)
        result = training_step(batches, progress)
        marks.append(_mark(bench))
    bench.forbid_waiting(False)
    bench.synchronize()
    step_ms = 1e3 * (time.perf_counter() - start) / (len(marks) - 5)
    loader.close()
    later = counters["stats"]["unique_graphs"] - graphs
    assert graphs == 1, f"{graphs} graphs instead of one"
    assert later == 0, f"{later} graphs were compiled after step 4"
    assert result.finite.item(), "the loss is not finite"
    rate = round(1e3 * bench.batch / step_ms)
    figure = {"batch": bench.batch, "step_ms": round(step_ms, 1), "images_per_s": rate}
    if not bench.gpu:
        return figure
    each = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]  # memory pools grow in the first of them
    peak = cost.peak_flops(torch.device(bench.device))
    return {
        **figure,
        "mfu_percent": round(100 * flops * rate / peak, 1) if peak else None,
        "gflop_per_image": round(flops / 1e9, 1),
        "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "first_steps_ms": [round(ms) for ms in each[:50]],
    }


def _mark(bench: Bench) -> Any:
    """A place in the device's queue of work."""
    if not bench.gpu:
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@check
def the_gpu_is_left_to_the_trainer(bench: Bench) -> None:
    """What decoding, cutting and augmenting 1,500 images a second take from a device that multiplies matrices."""
    side = 8192 if bench.gpu else 256
    matrix = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    costly = []
    for name, make in RECIPES.items():
        for form in bench.forms:
            loader = bench.loader(make(), form=form)
            batches = loader.forever()
            for _ in range(2):
                _multiply(bench, matrix, 10, 4, batches)
            each = _multiply(bench, matrix, 100, 1) / 100
            products, steps = max(1, round(bench.batch / 1500 / each)), 10 if bench.quick else 60
            rounds = [[_multiply(bench, matrix, products, steps, feed) for feed in (None, batches)] for _ in range(3)]
            alone, fed = np.median(rounds, axis=0)
            loader.close()
            taken = round(100 * (fed / alone - 1), 1)
            bench.note(f"{name} {form}", {"images_per_s": round(steps * bench.batch / fed), "percent_taken": taken})
            costly += [f"{name} {form}"] if fed > 1.05 * alone else []
    assert not bench.gpu or not costly, f"more than 5 % of the GPU: {', '.join(costly)}"


def _multiply(
    bench: Bench, matrix: torch.Tensor, products: int, steps: int, batches: Iterator[Batch] | None = None
) -> float:
    """Seconds for so many steps of so many products, a batch taken before each step where there are `batches`."""
    bench.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        if batches:
            next(batches)
        for _ in range(products):
            torch.mm(matrix, matrix)
    bench.synchronize()
    return time.perf_counter() - start


@check
def nccl_and_ddp(bench: Bench) -> None:
    """One rank with NCCL: DDP's step with and without Dynamo's splitting at its buckets, in graphs and milliseconds."""
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if bench.gpu else "gloo"
    device = torch.device("cuda", 0) if bench.gpu else None
    store = f"file://{bench.result.absolute()}.store"
    dist.init_process_group(backend, init_method=store, rank=0, world_size=1, device_id=device)
    room = methods.load("loca")
    config = bench.config(room)
    batches = itertools.repeat(cost.synthetic(room.views(config), bench.batch, bench.device))
    progress = torch.zeros((), device=bench.device)
    for splits in (True, False):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch._dynamo.config.optimize_ddp = splits
        method = room.Method(config).to(bench.device)
        method.compile(dynamic=False)
        ddp = parallel.data_parallel(method, device or torch.device("cpu"))
        optimizer = torch.optim.AdamW(method.parameter_groups(0.1), lr=1e-4, fused=True)
        training_step = TrainingStep(method, optimizer, model=ddp, amp_dtype=torch.bfloat16, clip=1.0)
        for step in range(14 if bench.gpu else 3):
            if step == 2:
                bench.synchronize()
                start = time.perf_counter()
            result = training_step(batches, progress)
        bench.synchronize()
        milliseconds = 1e3 * (time.perf_counter() - start) / (step - 1)
        assert result.finite.item(), "the loss is not finite"
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        bench.note("split at buckets" if splits else "whole", {"graphs": graphs, "step_ms": round(milliseconds, 1)})
    dist.destroy_process_group()


@check
def outputs_stay_valid(bench: Bench) -> None:
    """DALI's memory, views or decoded images, in each form: kept while held, and until the device has read it."""

    def sums(form: Form, late: bool) -> list[int]:
        loader, found = bench.loader(recipes.plain(), form=form), []
        with torch.cuda.stream(torch.cuda.Stream()) if late and bench.gpu else nullcontext():
            for batch, _ in zip(loader.forever(), range(24), strict=False):
                if late and bench.gpu:
                    torch.cuda._sleep(20_000_000)  # the batch is let go some 10 ms before it is read
                found.append(batch.views["image"].pixels.sum(dtype=torch.int64))
                if not late:
                    bench.synchronize()
        bench.synchronize()
        loader.close()
        return [int(total) for total in found]

    for form in bench.forms:
        loader = bench.loader(recipes.plain(), form=form)
        images = (batch.views["image"].pixels for batch in loader.forever())
        held = [(pixels, pixels.clone()) for pixels, _ in zip(images, range(8), strict=False)]
        bench.synchronize()
        loader.close()
        assert all(torch.equal(a, b) for a, b in held), f"{form}: a held batch was overwritten"
        assert sums(form, True) == sums(form, False), f"{form}: a batch was overwritten before the device had read it"
        bench.note(form, {"batches_held": len(held), "batches_read_late": 24})


@check
def the_host_runs_ahead(bench: Bench) -> None:
    """A batch is handed out while the trainer's stream is still busy: nothing waits for the device."""
    for form in bench.forms:
        loader = bench.loader(recipes.loca(), form=form)
        batches = loader.forever()
        for _ in range(6):
            next(batches)
        bench.synchronize()
        waits = []
        for _ in range(3):
            if bench.gpu:
                torch.cuda._sleep(2_000_000_000)  # about a second
                busy = torch.cuda.Event()
                busy.record()
            start = time.perf_counter()
            next(batches)
            waits.append(1e3 * (time.perf_counter() - start))
            early = not (bench.gpu and busy.query())
            bench.note(f"ms_per_batch_behind_a_busy_stream {form}", [round(wait, 1) for wait in waits])
            assert early, f"{form}: the loader waited for the trainer's stream"
            bench.synchronize()
        loader.close()


@check
def a_short_training(bench: Bench) -> None:
    """`run.py` in bf16, compiled: the loss falls, the loader is not waited for, the run resumes."""
    out, steps = bench.scratch / "run", 60 if bench.quick else 300
    command = [sys.executable, str(ROOT / "trainer/run.py"), "--shards", bench.shards, "--out", str(out)]
    small = f"--method loca --config {ROOT}/trainer/presets/loca_demo.yaml"
    real = "--method loca --batch_size 128 --optim.warmup_epochs 0.5"  # ViT-B/16
    command += [*(real if bench.gpu else small).split(), "--log.every", "20", "--log.tensorboard", "false"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    for length in (steps // 2, steps):
        words = [*command, "--steps", str(length)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"run.py ended with {done.returncode}: {done.stderr[-2000:]}"
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    keys = ("loss", "position_loss", "position_accuracy", "images_per_s", "step_ms", "data_wait_ms", "memory_gb")
    for name, line in (("first", lines[0]), ("last", lines[-1])):
        bench.note(name, {key: line[key] for key in keys})
    waited = lines[-1]["data_wait_ms"] / lines[-1]["step_ms"]
    assert not bench.gpu or waited < 0.02, f"{waited:.1%} of a step is spent on waiting for data, not 2 % at the most"
    assert lines[-1]["step"] == steps, "the second call did not go on"
    assert lines[-1]["position_loss"] < lines[0]["position_loss"], "the position loss did not fall"


@check
def marked_tests(bench: Bench) -> None:
    """The tests that need a GPU."""
    if not bench.gpu:
        return
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_colour.py", "tests/test_loader.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    bench.note("pytest", done.stdout.strip().splitlines()[-1:])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-500:]


def _rates(bench: Bench, loader: Loader, steps: int, repeats: int) -> list[float]:
    batches = loader.forever()
    for _ in range(8):
        next(batches)
    rates = []
    for _ in range(repeats):
        bench.synchronize()
        start, seen = time.perf_counter(), 0
        for _ in range(steps):
            seen += len(next(batches).label)
        bench.synchronize()
        rates.append(seen / (time.perf_counter() - start))
    return rates


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


def machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {
        **found,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "date": time.strftime("%Y-%m-%d"),
    }


def run_here(name: str, bench: Bench) -> None:
    """Runs a check in this process and writes its outcome."""
    bench.write(passed=False, error="it did not come to its end")
    try:
        CHECKS[name](bench)
        bench.write(passed=True)
    except Exception as error:
        bench.write(passed=False, error=f"{type(error).__name__}: {error}", trace=traceback.format_exc())


def run_apart(name: str, args: argparse.Namespace, shards: str, scratch: Path, minutes: float) -> dict[str, Any]:
    """Runs a check in a process of its own; its outcome, also where that process crashes or hangs."""
    if absent := missing(SOME_NEED.get(name, {})):
        return {"passed": False, "error": f"needs pip install {' '.join(absent)}", "figures": {}, "seconds": 0.0}
    if minutes <= 0:
        return {"passed": False, "error": f"not begun: {args.minutes} minutes are over", "figures": {}, "seconds": 0.0}
    folder = scratch / name
    folder.mkdir()
    words = [
        sys.executable,
        __file__,
        "--alone",
        name,
        "--out",
        str(folder),
        "--shards",
        shards,
        "--device",
        args.device,
    ]
    start = time.perf_counter()
    process = subprocess.Popen(
        words + ["--quick"] * args.quick, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, said = process.communicate(timeout=60 * minutes)
        end = f"its process ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
        end = f"it was stopped after {minutes:.2g} minutes"
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        result = {"passed": False, "error": "it did not begin", "figures": {}}
    if not result["passed"] or process.returncode:
        trace = result.get("trace", "")
        result |= {
            "passed": False,
            "error": f"{result.get('error', 'afterwards')}; {end}",
            "trace": trace + said[-3000:],
        }
    return {**result, "seconds": round(time.perf_counter() - start, 1)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", help="JPEG shards to use in place of made ones")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and images")
    parser.add_argument("--only", default="", help="run the checks whose name contains this")
    parser.add_argument("--device", default="cuda", help="cpu tries out this program, and shows nothing of a GPU")
    parser.add_argument("--minutes", type=float, default=90, help="for all checks together; those left over are named")
    parser.add_argument("--each", type=float, default=MINUTES, help="minutes after which one check is stopped")
    parser.add_argument("--alone", choices=CHECKS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device != "cpu" and not torch.cuda.is_available():
        print("gpu_check: no GPU that torch can use", file=sys.stderr)
        return 2
    if args.alone:
        run_here(args.alone, Bench(args.shards, args.device, args.out, args.quick, args.out / "result.json"))
        return 0
    begun = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(args.device), "checks": {}}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        shards = args.shards or make_shards(scratch / "shards", 1500 if args.quick else 6000)
        for name in [name for name in CHECKS if args.only in name]:
            left = args.minutes - (time.perf_counter() - begun) / 60
            result = report["checks"][name] = run_apart(name, args, shards, scratch, min(args.each, left))
            print(f"{'ok    ' if result['passed'] else 'FAILED'} {name} ({result['seconds']} s)")
            print(json.dumps({k: result[k] for k in ("error", "figures") if k in result}, indent=1), flush=True)
            (args.out / "gpu_check.json").write_text(json.dumps(report, indent=1))
            (args.out / "gpu_check.md").write_text(table(report))
    return 0 if all(result["passed"] for result in report["checks"].values()) else 1


def table(report: dict[str, Any]) -> str:
    lines = [
        ", ".join(f"{k} {v}" for k, v in report["machine"].items()),
        "",
        "| check | passed | seconds | figures |",
        "|---|---|---|---|",
    ]
    for name, result in report["checks"].items():
        found = json.dumps(result["figures"])
        if not result["passed"]:
            found = f"{result['error']} {found}"
        found = " ".join(found.replace("|", "/").split())
        passed = "yes" if result["passed"] else "NO"
        lines.append(f"| {name.replace('_', ' ')} | {passed} | {result['seconds']} | {found} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
