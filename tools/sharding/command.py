"""The common part of the sharders' command lines: options, the steps over a target, messages and exit codes."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline import host
from pipeline.specs import is_address, parse_args
from pipeline.tar import TarError

from . import SourceError, pool, printable
from .places import Address, Place
from .target import Target


def run(program: str, work: Callable[[], int]) -> int:
    """Run `work` and return its exit code: 1 if it failed, 2 if the input is unusable, each with a one-line message."""
    try:
        return work()
    except (SourceError, TarError) as error:
        what, code = str(error), 2
    except RuntimeError as error:
        what, code = str(error), 1
    except OSError as error:
        what = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        what, code = f"{what}; no incomplete file is visible, run the same command again to resume", 1
    except KeyboardInterrupt:
        what, code = "interrupted; run the same command again to resume", 130
    print(f"{program}: {printable(what)}", file=sys.stderr)
    return code


def carry_out(
    target: Target,
    make: pool.Make,
    args: argparse.Namespace,
    *,
    images: Callable[[list[int]], int],
    prepare: Callable[[list[int]], object] = lambda missing: None,
    refused: Iterable[tuple[str, str]] = (),
    more: Callable[[dict[str, int]], dict[str, Any]] = lambda sums: {},
) -> int:
    """Make this part's missing shards. If this part is the last, finish the split. Return the exit code.

    `make` makes a shard (see pool), `images` counts the images of some shards, and `prepare` saves the input of `make`
    in the work folder. `refused` and `more` are passed to Target.finish.
    """
    with target.lock(args.part):
        with target.exclusive():
            finished = target.begin()
        missing = target.missing(args.part)
        if missing:
            if done := len(target.part(args.part)) - len(missing):
                print(f"resuming: {done} of {done + len(missing)} shards are done")
            prepare(missing)
            pool.run(make, missing, images(missing), args.workers)
        if others := target.others(args.part):
            print(f"this part is done; helping with {len(others)} shards of other parts")
            prepare(others)
            pool.run(make, others, images(others), args.workers)
        with target.exclusive():
            manifest = target.finish(refused, args.strict, more)
            waiting = 0 if manifest else len(target.missing())
    if manifest is None:
        print(f"this part is done; {waiting} of {target.spec.shards} shards, of other parts, are still missing")
    elif finished:
        again = f"; {len(missing)} lost shards made again" if missing else ""
        print(f"{target} is complete: {manifest['num_samples']:,} samples{again}")
    else:
        counts = "".join(f"\n  {count:,} {what}" for what, count in manifest["counts"].items())
        print(
            f"done: {manifest['num_samples']:,} samples in {len(manifest['shards'])} shards, "
            f"{manifest['repaired']} repaired, {manifest['quarantined']} quarantined -> {target}{counts}"
        )
    return 0


def report(out: Path | Address, differences: list[str]) -> int:
    """Print the differences that `--check` found, and return its exit code."""
    for difference in differences:
        print(printable(difference))
    print(f"{out}: {f'{len(differences)} difference(s)' if differences else 'no difference'}")
    return int(bool(differences))


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all sharders; the description's first line is the summary."""
    summary, _, rest = description.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", type=place, nargs="?", metavar="SOURCE", help="the images; see below")
    add("out", type=place, nargs="?", metavar="OUT", help="a folder, or an address in a bucket (s3://, gs://, az://)")
    add("--split", default="train", help="split to read, and part of the shards' names (default: train)")
    add("--name", help="name of the set (default: the known data set's name, else the source's)")
    add("--workers", type=integer(1), default=host.cores(), metavar="N", help="processes (default: cores)")
    add("--check", type=place, metavar="OUT", help="verify a finished folder instead")
    add("--dry-run", action="store_true", help="report what would be done, write nothing")
    add("--strict", action="store_true", help="a quarantined image is an error: no manifest is written")
    add("--seed", type=integer(-(2**63), 2**63 - 1), default=0, help="seed of the shuffle (default: 0)")
    add("--shards", type=integer(1), metavar="N", help="number of shards (default: shards of about 140 MB)")
    text = "make part I of N, on many machines (default: from RANK and WORLD_SIZE or the Slurm array, else 0/1: all)"
    add("--part", type=part, metavar="I/N", help=text)
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    args = parse_args(parser, argv)
    if args.check is None and (args.source is None or args.out is None):
        parser.error("SOURCE and OUT are needed (or --check OUT)")
    names = args.split + (args.name or "").replace("-", "")
    if not names.replace("_", "").isalnum() or not args.split.replace("_", ""):
        parser.error("--split and --name become file names: letters, digits and _ only, in --name - as well")
    try:
        args.part = args.part or part(part_of_environment(os.environ))
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(f"RANK/WORLD_SIZE or SLURM_ARRAY_TASK_* in the environment make no part ({error}); say --part I/N")
    return args


def place(text: str) -> Place:
    """Parse an option: a path, or the address of a folder or file."""
    if is_address(text):
        return Address(text.rstrip("/"))
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: addresses begin with s3://, gs://, az://, http:// or https://")
    return Path(text)


def inside(out: Place, source: Place) -> bool:
    """Whether OUT is inside the folder SOURCE, or is that folder."""
    if isinstance(out, Path) and isinstance(source, Path):
        return source.is_dir() and out.resolve().is_relative_to(source.resolve())
    return f"{out}/".startswith(f"{source}/")


def part_of_environment(found: os._Environ[str]) -> str:
    """The part "I/N" from torchrun's rank or the index in a Slurm array; "0/1" (everything) otherwise."""
    if "RANK" in found and "WORLD_SIZE" in found:
        return f"{found['RANK']}/{found['WORLD_SIZE']}"
    if "SLURM_ARRAY_TASK_ID" in found and "SLURM_ARRAY_TASK_COUNT" in found:
        defaults = {"ID": "0", "MIN": "0", "STEP": "1"}
        number, first, step = (int(found.get(f"SLURM_ARRAY_TASK_{name}", text)) for name, text in defaults.items())
        return f"{(number - first) // step}/{found['SLURM_ARRAY_TASK_COUNT']}"
    return "0/1"


def part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not slash or not number.isdigit() or not count.isdigit() or int(number) >= int(count):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part I/N: the parts of four are 0/4 to 3/4")
    return int(number), int(count)


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return the type of an option: an integer from `low` to `high`."""

    def read(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or len(text) > 20:
            raise argparse.ArgumentTypeError(f"{text:.40} is no integer")
        if int(text) < low or (high is not None and int(text) > high):
            limits = f"from {low} to {high}" if high is not None else f"of {low} or more"
            raise argparse.ArgumentTypeError(f"{text} is no number {limits}")
        return int(text)

    return read
