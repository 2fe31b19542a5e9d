"""The machine of a measurement: its description, the resources allowed to this process, and the resources used."""

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pipeline import host

_TICKS = os.sysconf("SC_CLK_TCK")


def describe() -> dict[str, Any]:
    """The processor, allowed cores, memory, GPU and versions as a JSON-serialisable dict."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_quota": host.quota(),
        "load_before": round(os.getloadavg()[0], 1),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "numba", "nvidia-dali-cuda130", "numpy", "pillow")},
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
        found["driver"] = _driver()
    return found


def line(machine: dict[str, Any]) -> str:
    quota = f", {machine['cpu_quota']} by quota" if machine["cpu_quota"] else ""
    gpu = f"; {machine['gpu']} (driver {machine['driver']}, CUDA {machine['cuda']})" if "gpu" in machine else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (
        f"{machine['date']}: {machine['cpu']}, {machine['cores']} cores{quota}, load {machine['load_before']} before, "
        f"{machine['memory_gb']} GB{gpu}; commit {machine['commit']}, Python {machine['python']}, {versions}"
    )


def _commit() -> str | None:
    """The commit of this checkout, with a + if files differ from it, or None."""
    here = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--abbrev=9"]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _cpu_name() -> str:
    for text in _text("/proc/cpuinfo").splitlines():
        if text.startswith("model name"):
            return text.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    words = _text("/proc/driver/nvidia/version").split("Kernel Module")[-1].split()
    return next((word for word in words if word[0].isdigit()), "unknown")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_seconds() -> float:
    """CPU time of this process, its threads and its living children (the workers of a DataLoader)."""
    total = time.process_time()
    for task in Path("/proc/self/task").iterdir():
        for child in _text(f"{task}/children").split():
            fields = _text(f"/proc/{child}/stat").rpartition(")")[2].split()
            if fields:
                total += (int(fields[11]) + int(fields[12])) / _TICKS
    return total


def storage_bytes() -> int:
    """Bytes that this process has read from storage so far, not from the page cache."""
    for text in _text("/proc/self/io").splitlines():
        if text.startswith("read_bytes:"):
            return int(text.split()[1])
    return 0


def memory_mb() -> dict[str, float]:
    """Memory of this process: VmHWM, the peak including mapped files (pages of shards), and RssAnon, private now."""
    found = {}
    for text in _text("/proc/self/status").splitlines():
        name, _, value = text.partition(":")
        if name in ("VmHWM", "RssAnon"):
            found[name] = round(int(value.split()[0]) / 1e3, 1)
    return found
