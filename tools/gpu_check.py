"""Checks every claim that needs a GPU, and records the figures. One command, no installation:

    PYTHONPATH=. python3 tools/gpu_check.py --out DIR [--shards SPEC] [--quick] [--minutes 10]

Without --shards it generates shards: smooth random pictures of ImageNet's usual size, packed as WebDataset tars. Each
check runs in its own process with a time limit, so that a crash or a hang does not affect the others; figures recorded
before the crash are kept. The most important checks run first, so --minutes cuts off the least important ones. Writes
DIR/gpu_check.json and DIR/gpu_check.md after each check. Exit code 0 if every check passed, 1 if one failed, 2 if there
is no GPU or a package is missing.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Imported module -> package. A package in SOME_NEED is required by that check only.
MODULES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "nvidia.dali": "nvidia-dali-cuda130",
    "timm": "timm",
    "numba": "numba",
    "numpy": "numpy",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "jsonargparse": "jsonargparse[signatures]",
    "tqdm": "tqdm",
}
SOME_NEED = {"marked_tests": {"pytest": "pytest", "hypothesis": "hypothesis", "skimage": "scikit-image"}}


def missing(modules: dict[str, str]) -> list[str]:
    """Return the packages whose modules are not installed, without importing any of them."""
    found = []
    for module, package in modules.items():
        parents = module.split(".")[:-1]
        if any(find_spec(parent) is None for parent in parents) or find_spec(module) is None:
            found.append(package)
    return found


if absent := missing(MODULES):
    print(f"gpu_check: missing packages: pip install {' '.join(absent)}", file=sys.stderr)
    raise SystemExit(2)

import torch  # noqa: E402

from tools.checking import pixels, rates, steps  # noqa: E402
from tools.checking.bench import Bench  # noqa: E402
from tools.checking.pictures import make_shards  # noqa: E402

CHECKS = {  # the most important first
    check.__name__: check
    for check in (
        pixels.windows_are_equal_and_pixels_close,
        rates.loader_throughput,
        steps.one_compiled_graph,
        rates.the_gpu_is_left_to_the_trainer,
        steps.nccl_and_ddp,
        pixels.outputs_stay_valid,
        rates.the_host_runs_ahead,
        rates.shares_and_threads,
        steps.a_short_training,
        steps.marked_tests,
    )
}
BY_TORCHRUN = {"nccl_and_ddp"}
MINUTES = 8.0  # default time limit of one check
PACKAGES = ("torch", "triton", "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "timm", "numba", "numpy")


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
    """Run a check in this process and write its outcome."""
    bench.write(passed=False, error="it did not finish")
    try:
        CHECKS[name](bench)
        bench.write(passed=True)
    except Exception as error:
        bench.write(passed=False, error=f"{type(error).__name__}: {error}", trace=traceback.format_exc())


def run_apart(name: str, args: argparse.Namespace, shards: str, scratch: Path, minutes: float) -> dict[str, Any]:
    """Run a check in its own process and return its outcome, even if that process crashes or hangs."""
    if absent := missing(SOME_NEED.get(name, {})):
        return {"passed": False, "error": f"needs pip install {' '.join(absent)}", "figures": {}, "seconds": 0.0}
    if minutes <= 0:
        return {"passed": False, "error": f"not begun: {args.minutes} minutes are over", "figures": {}, "seconds": 0.0}
    folder = scratch / name
    folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"] if name in BY_TORCHRUN else []
    words = [
        sys.executable,
        *launcher,
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
        process.terminate()  # lets torchrun end its rank, which takes at most 30 s
        try:
            _, said = process.communicate(timeout=40)
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
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--shards", help="JPEG shards to use instead of generated ones")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and images")
    parser.add_argument("--only", default="", help="run only the checks whose name contains this")
    parser.add_argument("--device", default="cuda", help="cpu tests this program itself, and checks nothing on a GPU")
    parser.add_argument("--minutes", type=float, default=90, help="limit for all checks; the remaining ones are listed")
    parser.add_argument("--each", type=float, default=MINUTES, help="limit in minutes for each check")
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
