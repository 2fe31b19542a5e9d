#!/usr/bin/env python3
"""Compares the sharder's speed with copying, with a plain ShardWriter, and with decoding alone.

    python tools/bench_sharder.py FOLDER [--workers 2] [--rounds 3] [--copies 4]

FOLDER: class folders of real photographs. Each photograph is hard-linked --copies times, so that start-up has little
weight, and read from the page cache, so that the source's disk is not measured. Each round runs all candidates one
after the other, so that a noisy machine slows all of them alike. Prints medians of wall time, and CPU time, which
depends less on the machine's other load.
  cp           `cp -r` of the same files
  ShardWriter  one process, webdataset's writer, no checks
  decode       one process, Pillow decodes every JPEG to full size: the machine's own speed
  sharder      the whole command on 1 and on N workers: start-up, list, plan, verify, hash, sync, metadata
The last line is one JSON object.
"""

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import webdataset
from benchmarking import machine
from PIL import Image

TOOL = Path(__file__).with_name("shard_imagenet.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="class folders of JPEGs")
    parser.add_argument("--workers", type=int, default=2, help="workers of the parallel sharder (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each candidate (default: 3)")
    parser.add_argument("--copies", type=int, default=4, help="hard links to each photograph (default: 4)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder.parent) as work:  # hard links need the same file system
        source, out = Path(work, "source"), Path(work, "out")
        files = link(args.folder, source, args.copies)
        total = sum(len(file.read_bytes()) for file in files)  # also warms the page cache
        print(machine.line(machine.describe()))
        print(f"{len(files)} images, {total / 1e6:.0f} MB, mean {total / len(files) / 1e3:.0f} kB")
        shard = [sys.executable, str(TOOL), str(source), str(out), "--part", "0/1", "--workers"]
        many = f"sharder, {args.workers} workers"
        candidates: dict[str, Callable[[], object]] = {
            "cp": lambda: process(["cp", "-r", str(source), str(out)]),
            "ShardWriter": lambda: shard_writer(files, out),
            "decode": lambda: decode(files),
            "sharder, 1 worker": lambda: process([*shard, "1"]),
            many: lambda: process([*shard, str(args.workers)]),
        }
        wall: dict[str, list[float]] = {name: [] for name in candidates}
        cpu: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(args.rounds):
            for name, candidate in candidates.items():
                shutil.rmtree(out, ignore_errors=True)
                os.sync()  # so that no candidate pays for the write-back of the previous one
                began, busy = time.perf_counter(), sum(os.times()[:4])
                candidate()
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(sum(os.times()[:4]) - busy)
        shutil.rmtree(out)
        peak = peak_memory([*shard, str(max(2, args.workers))])

    seconds = {name: statistics.median(times) for name, times in wall.items()}
    for name, times in wall.items():
        each = statistics.median(cpu[name]) / len(files)
        print(
            f"{name:20s} {len(files) / seconds[name]:7.0f} images/s {total / seconds[name] / 1e6:6.0f} MB/s   "
            f"wall {seconds[name]:6.2f} s ({min(times):.2f} to {max(times):.2f})   CPU {each * 1e3:.2f} ms/image"
        )
    print(f"{many} against as many that only decode: {seconds[many] / (seconds['decode'] / args.workers):.2f}", end="")
    print("".join(f", {name}: {seconds[many] / seconds[name]:.2f}" for name in ("ShardWriter", "cp")), "times as long")
    print(f"memory of the largest worker: {peak:.0f} MB")
    result = {"images": len(files), "bytes": total, "workers": args.workers, "wall_s": wall, "cpu_s": cpu}
    print(json.dumps(result | {"worker_mb": round(peak)}))


def link(folder: Path, source: Path, copies: int) -> list[Path]:
    files = []
    for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")):
        for copy in range(copies):
            target = source / file.parent.name / f"{file.parent.name}_{file.stem}_{copy}{file.suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)
            files.append(target)
    return files


def process(words: list[str]) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def peak_memory(words: list[str]) -> float:
    """Peak memory in MB of a command's largest child, by the kernel's high-water mark, in a separate untimed run."""
    peak = 0
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None:
            with suppress(OSError):  # the process has just exited
                for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
                    lines = Path(f"/proc/{child}/status").read_text().splitlines()
                    peak = max(peak, *(int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
            time.sleep(0.02)
    return peak / 1024


def shard_writer(files: list[Path], out: Path) -> None:
    out.mkdir()
    labels = {name: number for number, name in enumerate(sorted({file.parent.name for file in files}))}
    with webdataset.ShardWriter(f"{out}/x-%04d.tar", maxcount=1250, verbose=0) as writer:
        for file in files:
            label = labels[file.parent.name]
            metadata = {"filename": file.name, "label": label}
            writer.write({"__key__": file.stem, "jpg": file.read_bytes(), "cls": label, "json": metadata})


def decode(files: list[Path]) -> None:
    for file in files:
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            image.load()


if __name__ == "__main__":
    main()
