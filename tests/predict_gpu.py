"""Prediction of a GPU's work on a machine without one: see h100. Each flag prints a line of JSON.

    python tests/predict_gpu.py --views              the kernels that cut views: machine code, bytes and time by count
    python tests/predict_gpu.py --step FILE.yaml...  a preset's step on one of its GPUs: memory and operations
    python tests/predict_gpu.py --graphs FILE.yaml [--ranks N]  its step as torch.compile sees it
    python tests/predict_gpu.py --table LINES        the lines that --step printed, as the table of docs/gpu.md

A step is the trainer's own, on CUDA tensors with shape, type and device but no contents. A tensor on the wrong device
or of the wrong type raises an error, and so does any value that the host would have to wait for.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import h100  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

PEAK = 989e12  # FLOP/s, dense bf16


def ranks(preset: Path) -> int:
    """The GPUs that the preset's own command asks for."""
    command = preset.read_text(encoding="utf-8")
    nodes, each = (re.search(rf"--{name}=(\d+)", command) for name in ("nnodes", "nproc_per_node"))
    return (int(nodes[1]) if nodes else 1) * (int(each[1]) if each else 1)


def on_gpu(mode: FakeTensorMode, module: nn.Module) -> nn.Module:
    """The module with weights on the device that have no contents; those that are shared stay shared."""
    seen: dict[int, Any] = {}
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            for name, value in table.items():
                if value is not None and id(value) not in seen:
                    with mode:
                        empty = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    is_weight = isinstance(value, nn.Parameter)
                    seen[id(value)] = nn.Parameter(empty, value.requires_grad) if is_weight else empty
                table[name] = seen.get(id(value))  # type: ignore[assignment]
    return module


def step(preset: Path) -> dict[str, Any]:
    """One training step of a preset on one of its GPUs, eager: peak memory in GiB by what holds it, GFLOP per image."""
    from torch.distributed._tools.mem_tracker import MemTracker

    from trainer import backbones, config, cost, methods, optim
    from trainer.step import TrainingStep

    settings = config.parse(["--config", str(preset)])
    module, run = methods.load(settings.run.method), settings.run
    batch = run.batch_size // run.speed.accumulate // ranks(preset)
    own = cost.estimate(lambda: module.Method(settings.method), module.views(settings.method), 4, "cpu")
    try:
        with torch.device("meta"):  # no memory: the largest has 5 GB of weights
            method = module.Method(settings.method)
    except NotImplementedError:  # it computes constants when it is made
        method = module.Method(settings.method)
    if run.speed.activation_checkpointing:
        backbones.checkpoint_activations_(method)
    mode, tracker = FakeTensorMode(), MemTracker()
    flops = FlopCounterMode(display=False, custom_mapping=cost.ATTENTION)
    method = on_gpu(mode, method)
    with mode:
        optimizer = optim.build(run.optim, method)
        training_step = TrainingStep(method, optimizer, amp_dtype=torch.bfloat16, clip=run.optim.clip)
        for parameter in training_step.trainable:  # the optimizer's state exists before the step that is measured
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        images = cost.synthetic(module.views(settings.method), batch, "cuda")
        tracker.track_external(method, optimizer, *(view.pixels for view in images.views.values()))
        with tracker, flops:
            result = training_step(itertools.repeat(images), torch.zeros((), device="cuda"))
    for name, value in {**result.metrics, "finite": result.finite}.items():
        assert value.device.type == "cuda" and value.ndim == 0, f"{name} is {value}"
    assert result.index.device.type == "cpu"
    (peak,) = (v for device, v in tracker.get_tracker_snapshot("peak").items() if device.type == "cuda")
    return {
        "preset": preset.stem,
        "ranks": ranks(preset),
        "batch": batch,
        "gib": {str(kind).rpartition(".")[2]: round(size / 2**30, 2) for kind, size in peak.items()},
        "gflop_per_image": round(flops.get_total_flops() / batch / 1e9, 1),  # those that are done twice, too
        "gflop_of_method": round(own.flops_per_image / 1e9, 1),
    }


KERNELS = {  # of pipeline.triton_views: the constants they are compiled with
    "_cut": {},
    "_paint": {"SUMS": 256},
    "_blur along x": {"LAST": False},
    "_blur along y": {"LAST": True},
}
TYPES = {
    "i64": "images",
    "i32": "widths views spans packed",
    "fp32": "factors sums",
    "i16": "weights gaussians",
    "u8": "out",
}


def compile_kernel(name: str, side: int = 224) -> dict[str, Any]:
    """One kernel as machine code for an H100, by Triton's own ptxas: registers, shared memory, loops."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline import triton_views

    function = getattr(triton_views, name.split(maxsplit=1)[0])
    constants = {"S": side, "BLOCK": triton_views.BLOCK, **KERNELS[name]}
    pointers = {argument: f"*{kind}" for kind, names in TYPES.items() for argument in names.split()}
    pointers["to"] = "*u8" if constants.get("LAST") else "*i32"
    signature = {a: "constexpr" if a in constants else pointers.get(a, "i32") for a in function.arg_names}
    places = {(function.arg_names.index(a),): value for a, value in constants.items()}
    made = triton.compile(ASTSource(function, signature, places), target=GPUTarget("cuda", 90, 32))
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        ptx.write_text(made.asm["ptx"])
        cubin.write_bytes(made.asm["cubin"])
        nvidia = triton.knobs.nvidia
        said = _run(nvidia.ptxas.path, "-v", "-arch=sm_90a", ptx, "-o", "/dev/null").stderr
        code = _run(nvidia.nvdisasm.path, "-c", cubin).stdout
    whole, loops = _loops(code)
    numbers = {what: int(re.search(pattern, said)[1]) for what, pattern in PTXAS.items()}  # type: ignore[index]
    threads = 32 * made.metadata.num_warps
    return {
        **numbers,
        "shared": made.metadata.shared,
        "pixels_per_thread": triton_views.BLOCK // threads,
        "instructions": whole,
        "loops": loops,
    }


PTXAS = {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill stores"}


def _run(*words: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)


def _loops(code: str) -> tuple[int, list[int]]:
    """Machine instructions in all, and those from each backward branch's target to the branch, innermost first."""
    places: dict[str, int] = {}
    count, loops = 0, []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = count
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            count += 1
            branch = re.search(r"BRA.*(\.L_x_\d+)", found[1])
            if branch and count - places.get(branch[1], count) > 1:  # not the one that ends a kernel
                loops.append(count - places[branch[1]])
    return count, sorted(loops)


def views_by_count(recipe: Any, kernels: dict[str, dict[str, Any]], images: int = 256) -> dict[str, float]:
    """Per image of ImageNet's mean size: bytes that the kernels read and write, and microseconds of an H100.

    Bytes as if no cache but a kernel's own reach helped; time is the larger of bytes at 3 TB/s and instructions at one
    a cycle for each of 4 x 132 schedulers at 1.755 GHz, summed over the kernels. Nothing is said about latency.
    """
    import numpy as np

    from pipeline import draws, plan

    sizes = np.tile(np.array([[387, 469]], np.int32), (images, 1))
    windows, params = draws.draw(draws.distributions(recipe), 0, 0, np.arange(images), sizes)
    planned = plan.plan(recipe.cuts, windows, params, sizes)
    pixels = np.array([cut.size**2 for cut in recipe.cuts for _ in range(cut.count)])
    areas = np.abs((windows[..., 2] - windows[..., 0]) * (windows[..., 3] - windows[..., 1]))
    blurred, reach = planned.views[..., plan.RADIUS] > 0, 2 * planned.views[..., plan.RADIUS] + 1
    rows, columns = planned.views[..., plan.ROW_TAPS], planned.views[..., plan.COLUMN_TAPS]
    steps = planned.views[..., plan.STEPS]
    table = sum(getattr(planned, name).nbytes for name in ("views", "factors", "spans", "weights", "gaussians"))

    moved = {
        "_cut": (3 * areas + 4 * pixels).sum() + table,
        "_paint": (4 * pixels + np.where(blurred, 4, 3) * pixels).sum(),
        "_blur along x": (blurred * 8 * pixels).sum(),
        "_blur along y": (blurred * 7 * pixels).sum(),
    }
    found = {}
    for name, kernel in kernels.items():
        loops = kernel["loops"]
        if name == "_cut":
            inner, outer, jitter = loops[0], loops[1] - loops[0], loops[-1]
            rest = kernel["instructions"] - sum(loops[1:])
            each = (
                rows * columns * inner + columns * outer + planned.views[..., plan.BEFORE_CONTRAST] * jitter + rest
            ) * pixels
        elif name == "_paint":
            each = (steps * loops[-1] + kernel["instructions"] - loops[-1]) * pixels
        else:
            each = blurred * (reach * loops[-1] + kernel["instructions"] - loops[-1]) * pixels
        seconds = each.sum() / kernel["pixels_per_thread"] / 32 / (4 * 132 * 1.755e9)
        found[name] = 1e6 * max(seconds, moved[name] / 3e12) / images
    return {
        "megabytes": round(sum(moved.values()) / images / 1e6, 2),
        "microseconds": round(sum(found.values()), 1),
        **{k: round(v, 2) for k, v in found.items()},
    }


def views() -> dict[str, Any]:
    """The kernels, and each recipe's views by count."""
    from pipeline import recipes

    kernels = {name: compile_kernel(name) for name in KERNELS}
    made = {
        "LOCA": recipes.loca(),
        "LOCA, paper": recipes.loca("paper"),
        "VICRegL": recipes.vicregl(),
        "VICRegL, ResNet-50": recipes.vicregl_resnet50(),
    }
    return {"kernels": kernels, "recipes": {name: views_by_count(recipe, kernels) for name, recipe in made.items()}}


def graphs(preset: Path, ranks: int) -> dict[str, Any]:
    """The step of a preset, compiled in place as `run.py` does it: graphs, breaks, and collectives inside.

    Traced through autograd on `ranks` ranks of a process group that sends nothing; and, where there are several, how
    many graphs the trainer's DDP makes of it, split at its buckets. The latter computes two images on the CPU.
    """
    import torch.distributed as dist
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    from trainer import config, cost, methods, parallel

    if ranks > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    settings = config.parse(["--config", str(preset)])
    module = methods.load(settings.run.method)
    collectives: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        called = [str(node.target) for node in graph.graph.nodes]
        collectives.extend(name for name in called if "c10d" in name and "wait_tensor" not in name)
        return graph.forward

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)
    counters = torch._dynamo.utils.counters
    mode = FakeTensorMode()
    method = on_gpu(mode, module.Method(settings.method))
    with mode:
        batch = cost.synthetic(module.views(settings.method), 4, "cuda")
        forward = torch.compile(method.forward, backend=backend, dynamic=False, fullgraph=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = forward(batch, torch.zeros((), device="cuda"))
        loss.backward()
    found = {
        "preset": preset.stem,
        "ranks": ranks,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "collectives": len(collectives),
    }
    if ranks == 1:
        return found

    def counted(graph: torch.fx.GraphModule, _: Any) -> Any:
        found["graphs_in_ddp"] = found.get("graphs_in_ddp", 0) + 1
        return graph.forward

    torch._dynamo.reset()
    method = module.Method(settings.method)
    method.compile(dynamic=False, backend=counted)
    ddp = parallel.data_parallel(method, torch.device("cpu"))
    ddp(cost.synthetic(module.views(settings.method), 2, "cpu"), torch.zeros(()))
    return found


def table(lines: list[str]) -> str:
    """Markdown: a row for each preset, by operations."""
    head = ("preset", "GPUs", "batch each", "GiB", "most in 72 GiB", "GFLOP an image", "images/s at 45 % of an H100")
    rows = [head, ("---",) * len(head)]
    for found in sorted(map(json.loads, lines), key=lambda found: (found["preset"][:4], found["gflop_of_method"])):
        held = {kind: found["gib"].get(kind, 0.0) for kind in ("PARAM", "BUFFER", "OPT")}
        total, fixed = found["gib"]["Total"], sum(held.values())
        most = int((72 - fixed) / (total - fixed) * found["batch"])
        gflop = found["gflop_of_method"]
        numbers = (f"{total:.1f}", f"{most:,}", f"{gflop:,.1f}", f"{0.45 * PEAK / gflop / 1e9:,.0f}")
        rows.append((found["preset"], str(found["ranks"]), str(found["batch"]), *numbers))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _hooks_take_frozen_tensors() -> None:
    """MemTracker hooks every weight, also a teacher's that takes no gradient."""

    def tolerant(real: Any) -> Any:
        def hook(self: Any, function: Any) -> Any:
            return real(self, function) if self.requires_grad else SimpleNamespace(remove=lambda: None)

        return hook

    for name in ("register_hook", "register_post_accumulate_grad_hook"):
        setattr(torch.Tensor, name, tolerant(getattr(torch.Tensor, name)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", action="store_true")
    parser.add_argument("--step", nargs="+", type=Path, default=[])
    parser.add_argument("--graphs", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    if args.table:
        print(table(args.table.read_text().splitlines()))
        return
    if "SEES_H100" not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(
                subprocess.run([sys.executable, *sys.argv], env=h100.environment(Path(folder)), check=False).returncode
            )
    h100.pretend()
    if args.views:
        print(json.dumps(views()), flush=True)
    if args.graphs:
        print(json.dumps(graphs(args.graphs, args.ranks)), flush=True)
    if args.step:
        _hooks_take_frozen_tensors()
    for preset in args.step:
        print(json.dumps(step(preset)), flush=True)


if __name__ == "__main__":
    main()
