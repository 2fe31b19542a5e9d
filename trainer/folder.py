"""The folder of a run: its lock, the check that settings fit the earlier run, config.yaml and status.json."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline import host
from trainer import config

# A run cannot resume with other values of these. `shards` may change, since the loader compares their contents.
FIXED = ("method", "seed", "optim.name", "METHOD.backbone", "METHOD.views.")
FREE = ("out", "stop_after", "patience")  # settings whose changes are not reported

State = Literal["running", "done", "stopped", "failed"]


def stop_code() -> int:
    """Return the exit code of a run that stopped after writing a checkpoint: 75 (EX_TEMPFAIL), or 0 under torchrun.

    torchrun takes any other code for a failure and would restart the run that was just stopped.
    """
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else 75


@dataclass(frozen=True)
class Result:
    """The outcome of a run that did not fail."""

    out: Path
    """folder of the run"""
    state: State
    """"done", or "stopped" by a signal, a time limit or a storage outage, with a checkpoint to resume from"""
    step: int
    """steps done so far"""
    of: int
    """total steps of the run"""
    record: dict[str, Any]
    """the last record written to log.jsonl; empty if no step was left to do"""


class RunFolder:
    """The folder `path`, locked by this process.

    Functions registered with `at_exit` are called before the lock is released, even if an exception ends the run.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path, self.step, self.total = path, 0, 0
        self.at_exit = stack.callback

    def status(self, state: State, step: int) -> None:
        """Write status.json: {"state", "step", "of": `total`}. Errors such as a full disk are ignored."""
        self.step = step
        content = json.dumps({"state": state, "step": step, "of": self.total}) + "\n"
        with suppress(OSError):
            host.write_atomic(self.path / "status.json", content.encode())

    def changes(self, settings: config.Settings) -> list[str]:
        """Return a sentence for each setting that differs from the earlier run in this folder.

        Raises UsageError if a setting in FIXED differs and there is a checkpoint.
        """
        written = self.path / "config.yaml"
        before = config.read_yaml(written) if written.exists() else {}
        after = config.flat(yaml.safe_load(settings.text))
        fixed = tuple(name.replace("METHOD", settings.run.method) for name in FIXED)
        resumes = any((self.path / "checkpoints").glob("step_*.pt"))
        found = []
        for key, value in after.items():
            if key in before and before[key] != value and key not in FREE:
                found.append(f"this run has {key}={_plain(before[key])}, you ask for {_plain(value)}")
                if resumes and key.startswith(fixed):
                    raise config.UsageError(f"--out {self.path}: cannot resume: {found[-1]}; name another folder")
        return found

    def write_config(self, text: str) -> None:
        """Write config.yaml. Raises UsageError."""
        try:
            host.write_atomic(self.path / "config.yaml", text.encode())
        except OSError as error:
            raise config.UsageError(f"--out {self.path}: cannot be written ({error.strerror})") from None


@contextmanager
def held(path: Path) -> Iterator[RunFolder]:
    """Create the folder and lock it. An exception in the block sets the status to "failed" if `total` is known by then.

    Raises UsageError if another run holds the lock or the folder cannot be written.
    """
    with ExitStack() as stack:
        folder = RunFolder(path, stack)
        try:
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(host.lock(path / "lock"))
        except BlockingIOError:
            raise config.UsageError(f"--out {path}: another run is writing there; name another folder") from None
        except OSError as error:
            raise config.UsageError(f"--out {path}: cannot be written ({error.strerror})") from None
        try:
            yield folder
        except BaseException:
            if folder.total:
                folder.status("failed", folder.step)
            raise


def _plain(value: object) -> str:
    return "null" if value is None else str(value)
