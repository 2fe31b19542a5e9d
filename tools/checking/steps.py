"""Checks of a method's step (graphs, time, memory, ranks), a short training, and the tests that need a GPU."""

import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from typing import Any

import torch

from trainer import cost, methods, parallel
from trainer.step import TrainingStep

from .bench import ROOT, Bench


def one_compiled_graph(bench: Bench) -> None:
    """Check the steps of pretraining: one graph, no compilation after step 4, no synchronisation; note rate and MFU."""
    failed = []
    pretraining = [name for name in methods.names() if (ROOT / f"trainer/presets/{name}_demo.yaml").exists()]
    for name in [*pretraining, *(["vicregl resnet50"] if bench.gpu else [])]:
        try:
            bench.note(name, _train(bench, *name.split()))
        except Exception as error:  # check the other methods, too
            traceback.print_exc()
            failed.append(f"{name}: {type(error).__name__}: {error}")
        finally:
            bench.forbid_waiting(False)
    assert not failed, "; ".join(failed)


# GiB of an eager step: weights and optimizer, and each image, as counted by tests/predict_gpu.py (docs/gpu.md).
PREDICTED = {"loca": (1.5, 0.1752), "vicregl": (2.13, 0.2792), "vicregl resnet50": (1.32, 0.0938)}


def _train(bench: Bench, name: str, backbone: str | None = None) -> dict[str, Any]:
    module = methods.load(name)
    config = module.Config(backbone=backbone, drop_path=0.0) if backbone else bench.config(module)
    method = module.Method(config).to(bench.device)
    flops = cost.estimate(lambda: module.Method(config), module.views(config), 4, bench.device).flops_per_image
    optimizer = torch.optim.AdamW(method.parameter_groups(0.1), lr=1e-4, fused=True)
    method.compile(dynamic=False)
    training_step = TrainingStep(method, optimizer, amp_dtype=torch.bfloat16, clip=1.0)
    loader = bench.loader(module.views(config))
    batches = loader.forever()
    for _ in range(2):
        next(batches)  # compiles the loader's own graphs, for the colours
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
    each = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]  # memory pools grow in the first steps
    peak = cost.peak_flops(torch.device(bench.device))
    fixed, each_image = PREDICTED[f"{name} {backbone}" if backbone else name]
    return {
        **figure,
        "mfu_percent": round(100 * flops * rate / peak, 1) if peak else None,
        "gflop_per_image": round(flops / 1e9, 1),
        "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "predicted_gib": round(fixed + each_image * bench.batch, 1),
        "first_steps_ms": [round(ms) for ms in each[:50]],
    }


def _mark(bench: Bench) -> Any:
    """A timing event in the device's queue, or None without a GPU."""
    if not bench.gpu:
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def nccl_and_ddp(bench: Bench) -> None:
    """Run NCCL with one rank. Note graphs and milliseconds of DDP's step with and without Dynamo's split at buckets."""
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if bench.gpu else "gloo"
    device = torch.device("cuda", 0) if bench.gpu else None
    if dist.is_torchelastic_launched():  # as under gpu_check
        dist.init_process_group(backend, device_id=device)
    else:
        store = f"file://{bench.result.absolute()}.store"
        dist.init_process_group(backend, init_method=store, rank=0, world_size=1, device_id=device)
    bench.note("launched by", "torchrun" if dist.is_torchelastic_launched() else "itself")
    whole = torch.ones(4, device=bench.device)
    dist.all_reduce(whole)
    assert whole.tolist() == [1.0] * 4, "a sum over one rank changed the numbers"
    module = methods.load("loca")
    config = bench.config(module)
    batches = itertools.repeat(cost.synthetic(module.views(config), bench.batch, bench.device))
    progress = torch.zeros((), device=bench.device)
    for splits in (True, False):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch._dynamo.config.optimize_ddp = splits
        method = module.Method(config).to(bench.device)
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


def a_short_training(bench: Bench) -> None:
    """Check `run.py` in bf16, compiled: the loss falls, the trainer does not wait for the loader, the run resumes."""
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
    assert not bench.gpu or waited < 0.02, f"{waited:.1%} of a step is spent waiting for data, more than 2 %"
    assert lines[-1]["step"] == steps, "the second call did not resume"
    assert lines[-1]["position_loss"] < lines[0]["position_loss"], "the position loss did not fall"


def marked_tests(bench: Bench) -> None:
    """Run the tests that need a GPU."""
    if not bench.gpu:
        return
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_colour.py", "tests/test_loader.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    bench.note("pytest", done.stdout.strip().splitlines()[-1:])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-500:]
