#!/usr/bin/env python3
"""How fast the sharder is: against copying, against a plain ShardWriter, against decoding alone.

    python tools/bench_sharder.py FOLDER [--workers 2] [--rounds 3] [--copies 4]

FOLDER: class folders of real photographs; each is linked --copies times so that start-up weighs little, and read from
the page cache, so the source's disk is not measured. Each round runs all candidates one after the other, so that a
noisy machine slows all alike; medians are printed, and CPU time beside wall time: other people's load moves it less.
  cp           `cp -r` of the same files
  ShardWriter  one process, webdataset's writer, no check of anything
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
from pathlib import Path

import webdataset
from PIL import Image

TOOL = Path(__file__).with_name("shard_imagenet.py")
IMAGENET = {"ImageNet-1k": 138e9, "ImageNet-21k, winter21": 1.1e12}  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="class folders of JPEGs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder.parent) as work:  # beside it: hard links need one file system
        source, out = Path(work, "source"), Path(work, "out")
        files = link(args.folder, source, args.copies)
        total = sum(len(file.read_bytes()) for file in files)  # also warms the page cache
        print(f"{machine()}\n{len(files)} images, {total / 1e6:.0f} MB, {sizes(files, total)}")
        many = f"sharder, {args.workers} workers"
        runs: dict[str, Callable[[], None]] = {
            "cp": lambda: process("cp", "-r", source, out),
            "ShardWriter": lambda: shard_writer(files, out),
            "decode": lambda: decode(files),
            "sharder, 1 worker": lambda: sharder(source, out, 1),
            many: lambda: sharder(source, out, args.workers),
        }
        wall: dict[str, list[float]] = {name: [] for name in runs}
        cpu: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                shutil.rmtree(out, ignore_errors=True)
                os.sync()  # no candidate pays for writing back what another one left
                began, busy = time.perf_counter(), sum(os.times()[:4])
                run()
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(sum(os.times()[:4]) - busy)
        peak = peak_memory(source, out, args.workers)

    for name, times in wall.items():
        middle, each = statistics.median(times), statistics.median(cpu[name]) / len(files)
        print(
            f"{name:20s} {len(files) / middle:7.0f} images/s {total / middle / 1e6:6.0f} MB/s   "
            f"wall {middle:6.2f} s ({min(times):.2f} to {max(times):.2f})   CPU {each * 1e3:.2f} ms/image"
        )
    seconds = {name: statistics.median(times) for name, times in wall.items()}
    busy_for = {name: statistics.median(times) for name, times in cpu.items()}
    print(f"against {args.workers} x decoding: wall {seconds[many] / (seconds['decode'] / args.workers):.2f}", end=", ")
    print(f"CPU {busy_for[many] / busy_for['decode']:.2f} times as long")
    for name in ("ShardWriter", "cp"):
        print(f"{args.workers} workers against {name}: wall {seconds[many] / seconds[name]:.2f} times as long")
    print(f"memory of the largest worker: {peak:.0f} MB")
    hours = {name: busy_for[many] / total * size / 64 / 3600 for name, size in IMAGENET.items()}
    for name, projected in hours.items():
        need = IMAGENET[name] / projected / 3600 / 1e9
        print(f"{name}: {projected:.2f} h of CPU on 64 cores, if the disk reads and writes {need:.1f} GB/s")
    said = {"images": len(files), "bytes": total, "workers": args.workers, "wall_s": wall, "cpu_s": cpu}
    print(json.dumps(said | {"worker_mb": round(peak), "cpu_hours_on_64_cores": hours}))


def link(folder: Path, source: Path, copies: int) -> list[Path]:
    files = []
    for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")):
        for copy in range(copies):
            target = source / file.parent.name / f"{file.stem}_{copy}{file.suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)
            files.append(target)
    return files


def process(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def shard_writer(files: list[Path], out: Path) -> None:
    out.mkdir()
    labels = {name: number for number, name in enumerate(sorted({file.parent.name for file in files}))}
    with webdataset.ShardWriter(f"{out}/x-%04d.tar", maxcount=1250, verbose=0) as writer:
        for file in files:
            label = labels[file.parent.name]
            said = {"filename": file.name, "label": label}
            writer.write({"__key__": file.stem, "jpg": file.read_bytes(), "cls": label, "json": said})


def decode(files: list[Path]) -> None:
    for file in files:
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            image.load()


def sharder(source: Path, out: Path, workers: int) -> None:
    process(sys.executable, TOOL, source, out, "--workers", workers, "--part", "0/1")


def peak_memory(source: Path, out: Path, workers: int) -> float:
    """MB that the largest worker process ever held, by the kernel's own high-water mark; an untimed run of its own."""
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, str(TOOL), str(source), str(out), "--workers", str(max(2, workers)), "--part", "0/1"]
    peak = 0
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None:
            for child in children(run.pid):
                try:
                    status = Path(f"/proc/{child}/status").read_text()
                except OSError:
                    continue  # it has just ended
                peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
            time.sleep(0.02)
    return peak / 1024


def children(parent: int) -> list[str]:
    try:
        return Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return []


def sizes(files: list[Path], total: int) -> str:
    found = []
    for file in files:
        with Image.open(file) as image:
            found.append(image.size)
    width, height = (statistics.mean(side) for side in zip(*found, strict=True))
    return f"mean {total / len(files) / 1e3:.0f} kB, {width:.0f} x {height:.0f}"


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in info if "model name" in line), "unknown CPU")
    cores = len(os.sched_getaffinity(0))
    return f"{cpu}, {cores} cores allowed, load before {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}"


if __name__ == "__main__":
    main()
