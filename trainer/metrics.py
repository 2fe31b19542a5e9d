"""Logging: metrics are kept on the device, fetched once per log line, and written to several outputs."""

import json
import math
import resource
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline import Batch, ShardSet, host
from trainer import config as settings
from trainer import parallel, visualise
from trainer.console import Console, informing


class Meter:
    """Means of 0-d tensors over steps and ranks. `add` does not synchronise with the device; `fetch` does.

    Non-finite values are left out: one skipped step, counted elsewhere, must not turn the mean into NaN.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach().float())

    def fetch(self, largest: str) -> dict[str, float]:
        """Return the means since the last fetch, equal on all ranks, and the maximum of the value named `largest`.

        Ranks must have equal values of `largest`; its maximum is named NAME_max. NaN stands for no finite value.
        """
        stacked = {name: torch.stack(values) for name, values in self._values.items()}
        finite = {name: values.isfinite() for name, values in stacked.items()}
        sums = torch.stack([values.where(finite[name], 0).sum() for name, values in stacked.items()])
        counts = torch.stack([flags.sum() for flags in finite.values()])
        sums, counts = parallel.mean_over_ranks(torch.stack([sums, counts]))
        maximum = stacked[largest].where(finite[largest], -torch.inf).max()
        *means, peak = torch.cat([sums / counts, maximum[None]]).tolist()
        self._values = {}
        return {**dict(zip(stacked, means, strict=True)), f"{largest}_max": peak if math.isfinite(peak) else math.nan}


class Clock:
    """Measures step time, waiting time and throughput between two log lines. Pauses for checkpoints do not count."""

    def __init__(self, batch_size: int, world_size: int) -> None:
        self._batch_size, self._world_size = batch_size, world_size
        self.restart()

    def restart(self) -> None:
        self._start, self._waited, self.steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as time spent waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the steps still running on the device are not part of the pause
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def rates(self) -> dict[str, float]:
        elapsed = self.elapsed()
        rate = self.steps * self._batch_size / elapsed
        return {
            "images_per_s": rate,
            "images_per_s_rank": rate / self._world_size,
            "step_ms": 1e3 * elapsed / self.steps,
            "data_wait_ms": 1e3 * self._waited / self.steps,
        }


class Network:
    """Measures this rank's reads of shards in a bucket or on the web. Reports nothing for shards on a disk."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards, self._before = shards, shards.figures

    def since_last_line(self, seconds: float) -> dict[str, float]:
        """Return the share of images found in the local cache, MB/s over the network, and the threads waiting for it.

        The last is a sum over the loader's threads: 2 means that two of them waited all the time.
        """
        now = self._shards.figures
        if now is None or self._before is None:
            return {}
        more, self._before = now - self._before, now
        return {
            "cache_hits": more.from_cache / max(1, more.from_cache + more.by_range),
            "network_mb_per_s": more.fetched / 1e6 / seconds,
            "network_waits": more.waited / seconds,
        }


class Profile:
    """Traces five early steps, writes the trace for chrome://tracing and prints a table of the time spent."""

    PARTS = ("data", "forward", "backward", "optimizer", "after_step")

    def __init__(self, out: Path) -> None:
        self._path = out / "profile.json"
        self._profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=5, warmup=2, active=5, repeat=1), on_trace_ready=self._report
        )
        self._profiler.start()

    def step(self) -> None:
        self._profiler.step()

    def _report(self, profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(self._path))
        events = profiler.key_averages()
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        print(events.table(sort_by=key, row_limit=10))
        spans = {event.key: event.cpu_time_total for event in events if event.key in self.PARTS}
        whole = sum(spans.values()) or 1.0
        print(
            "  ".join(f"{part} {spans.get(part, 0.0) / whole:.0%}" for part in self.PARTS),
            f"  {self._path}",
            flush=True,
        )


def memory_gb(device: torch.device) -> float:
    """Return the peak memory of this process in GB: allocated on the GPU, or resident on the host without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# The names in a log record by group. All other names are the method's own and belong to the group "loss".
GROUPS = {
    "probe": "knn segment_miou",
    "optim": "epoch lr weight_decay grad_norm grad_norm_max loss_scale skipped ema_momentum",
    "speed": "images_per_s images_per_s_rank step_ms data_wait_ms memory_gb mfu bad_samples cache_hits "
    "network_mb_per_s network_waits",
}


def group(name: str) -> str:
    """Return the group of a metric in TensorBoard and in the report: loss, probe, optim or speed."""
    return next((group for group, names in GROUPS.items() if name in names.split()), "loss")


class Log:
    """Writes records to log.jsonl, the terminal, TensorBoard and wandb. For rank 0 only.

    Lines that an interrupted run wrote after its last checkpoint are removed, so that log.jsonl has each step once. A
    full disk costs log lines, not the run. Raises UsageError if wandb is requested but not installed, or if an earlier
    log cannot be rewritten. `headline_metrics` go to Console, `config` to TensorBoard.
    """

    def __init__(
        self,
        out: Path,
        start: int,
        total: int,
        cfg: settings.Log,
        headline_metrics: Sequence[str] = (),
        config: str = "",
    ) -> None:
        if cfg.wandb:
            try:
                import wandb
            except ImportError:
                raise settings.UsageError(
                    f"--log.wandb {cfg.wandb}: wandb is not installed; pip install wandb"
                ) from None
        out.mkdir(parents=True, exist_ok=True)
        path = out / "log.jsonl"
        try:
            if path.exists():
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
                kept = "".join(f"{line}\n" for line in lines if _step(line) <= start)
                host.write_atomic(path, kept.encode())
            self._out, self._file = out, path.open("a", encoding="utf-8")
        except OSError as error:
            raise settings.UsageError(f"{path}: cannot be written ({error.strerror})") from None
        self._console, self._seen = Console(start, total, headline_metrics), False
        self._board: Any = None
        self._wandb: Any = None
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
            self._board.add_text("config", f"```yaml\n{config}```", start)
        if cfg.wandb:
            name = out / "wandb_id"  # a random id, since different runs may have folders of the same name
            if not name.exists():
                name.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
            self._wandb = wandb.init(
                project=cfg.wandb, dir=str(out), name=out.name, id=name.read_text(encoding="utf-8"), resume="allow"
            )

    def line(self, record: dict[str, Any]) -> None:
        """Write `record`, which has at least step, epoch and step_ms, to all outputs."""
        step = record["step"]
        numbers = {name: value for name, value in record.items() if math.isfinite(value)}
        try:
            self._file.write(json.dumps(dict.fromkeys(record) | numbers) + "\n")  # null for NaN, which JSON lacks
            self._file.flush()  # if this fails, the buffered line is written with the next one
        except OSError as error:
            warnings.warn(f"log.jsonl: {error}; the run continues", stacklevel=2)
        self._console.line(record)
        del numbers["step"]
        for name, value in numbers.items() if self._board else ():
            self._board.add_scalar(f"{group(name)}/{name}", value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Write an image u8 (H, W, 3) to NAME.png in the run's folder and to TensorBoard. Raises OSError."""
        if self._board:
            self._board.add_image(name, pixels, step, dataformats="HWC")
        host.write_atomic(self._out / f"{name}.png", lambda file: Image.fromarray(pixels).save(file, "PNG"))

    def step(self, batch: Batch, step: int) -> None:
        """Advance the progress bar as a step begins. The first call also writes a picture of the batch's views."""
        if not self._seen:
            self._seen = True
            with informing("picture of the views"):
                self.picture("views", visualise.views(batch), step)
        self._console.step()

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()
        self._console.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def _step(line: str) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        step = None  # a line truncated by a crash
    return step if isinstance(step, int | float) else math.inf
