"""Error handling shared by the commands other than run.py: one sentence on stderr, and run.py's exit codes."""

import argparse
import sys
from collections.abc import Callable
from functools import wraps

import torch

from pipeline import ShardSet
from trainer.config import RunError, UsageError
from trainer.folder import stop_code


class Stopped(Exception):
    """Training was stopped by a signal or a time limit, after writing a checkpoint."""


def command(name: str) -> Callable[[Callable[[list[str]], None]], Callable[[list[str]], int]]:
    """Return a decorator that turns `main(argv)` into the program `name`, which returns run.py's exit codes."""

    def decorate(main: Callable[[list[str]], None]) -> Callable[[list[str]], int]:
        @wraps(main)
        def program(argv: list[str]) -> int:
            try:
                main(argv)
            except Stopped:
                return stop_code()
            except (OSError, ValueError, UsageError, RunError) as error:
                said = str(error)
                if isinstance(error, OSError) and error.filename and error.strerror:
                    said = f"{error.filename}: {error.strerror}"
                print(f"{name}: {' '.join(said.split())}", file=sys.stderr)
                return 1 if isinstance(error, RunError) else 2
            return 0

        return program

    return decorate


def check(args: argparse.Namespace) -> None:
    """Raise ValueError if ``--untrained`` is not a seed or ``--device`` is not available."""
    if args.untrained is not None and not 0 <= args.untrained < 2**63:
        raise ValueError(f"--untrained {args.untrained}: a seed lies between 0 and 2**63")
    try:
        torch.empty(0, device=args.device)
    except (AssertionError, RuntimeError) as error:  # torch's error for a missing device depends on the build
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from None


def warn_if_same(name: str, train: ShardSet, val: ShardSet) -> None:
    """Print a warning of the program `name` if the images to fit on are those to score."""
    if train.fingerprint == val.fingerprint:
        print(f"{name}: --train and --val are the same images: the scores are meaningless", file=sys.stderr)
