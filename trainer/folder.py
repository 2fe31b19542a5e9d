"""The folder of a run: one run at a time writes to it, with settings that fit what it holds, and says how it goes."""

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

# Settings whose change would make the rest of a run meaningless. Shards may have moved: the loader compares contents.
FIXED = ("method", "seed", "optim.name", "METHOD.backbone", "METHOD.views.")
FREE = ("out", "stop_after", "patience")  # settings that each start may name again

State = Literal["running", "done", "stopped", "failed"]


def stop_code() -> int:
    """The exit code of a run that was stopped after a checkpoint: EX_TEMPFAIL, run it again to go on.

    Under torchrun it is 0: any other is a failure, for which torchrun would restart what was just stopped.
    """
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else 75


@dataclass(frozen=True)
class Result:
    """How a run ended that did not fail."""

    out: Path
    """its folder"""
    state: State
    """"done", or "stopped" by a signal, a time limit or an outage of the storage, with a checkpoint: train again"""
    step: int
    of: int
    """steps it has made, and is to make"""
    record: dict[str, Any]
    """its last line of log.jsonl; empty where there was nothing left to do"""


class RunFolder:
    """The folder `path`, which this process has locked.

    Functions given to `at_exit` are called before the lock is released, also where an exception ends the run.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path, self.step, self.total = path, 0, 0
        self.at_exit = stack.callback

    def status(self, state: State, step: int) -> None:
        """Writes status.json: {"state", "step", "of": `total`}. A full disk costs the status, not the run."""
        self.step = step
        content = json.dumps({"state": state, "step": step, "of": self.total}) + "\n"
        with suppress(OSError):
            host.write_atomic(self.path / "status.json", content.encode())

    def changes(self, settings: config.Settings) -> list[str]:
        """What differs from the settings of this folder's run, a sentence each. Raises UsageError for one that may not.

        Where there is no checkpoint yet, everything may.
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
                    raise config.UsageError(f"--out {self.path}: cannot go on: {found[-1]}; name another folder for it")
        return found

    def write_config(self, text: str) -> None:
        """Writes config.yaml. Raises UsageError."""
        try:
            host.write_atomic(self.path / "config.yaml", text.encode())
        except OSError as error:
            raise config.UsageError(f"--out {self.path}: cannot be written ({error.strerror})") from None


@contextmanager
def held(path: Path) -> Iterator[RunFolder]:
    """Makes the folder and locks it. Its run is "failed" where an exception ends it once its `total` is known.

    Raises UsageError where another run holds it, or it cannot be written to.
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
