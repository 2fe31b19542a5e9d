#!/usr/bin/env python3
"""ImageNet (1k, 21k) or any folder of images -> shuffled WebDataset tars, each image proven to decode.

    python tools/shard_imagenet.py SOURCE OUT --split train          # shard; run it again to go on after a stop
    python tools/shard_imagenet.py SOURCE OUT --split val --labels DEVKIT_OR_CSV
    python tools/shard_imagenet.py --check OUT                       # verify every byte of a finished folder

SOURCE: a folder of class folders, Kaggle's layout, ILSVRC2012_img_train.tar or _val.tar or the folder they lie in,
ImageNet-21k as a (gzipped) tar of class tars, a folder of class tars or of class folders, or unlabelled images.
OUT gets <name>-<split>-0000.tar ..., a DALI index (.idx) and a sample table (.samples.npy) beside each, timm's
_info.json, manifest.json (sha256 of each shard), synsets.txt and quarantine.jsonl (what was left out, and why).

Same source and options give the same bytes, whatever the number of workers and however often the run was killed. Over
many machines: start the same command under torchrun or as a Slurm array; each takes its part, the last one finishes.
Exit code: 0 done, 1 failed or differences found, 2 wrong usage or unusable input.
"""

import argparse
import os
import sys
from pathlib import Path

from sharding import SourceError, check, plan, pool, printable, samples, sources
from sharding.images import Rules
from sharding.target import Busy, Target

from pipeline import host
from pipeline.tar import TarError


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        return verify(args) if args.check else shard(args)
    except (SourceError, TarError) as error:
        return fail(error, 2)
    except (Busy, RuntimeError) as error:
        return fail(error, 1)
    except OSError as error:
        what = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        return fail(f"{what}; no incomplete file is visible, run the same command again to resume", 1)
    except KeyboardInterrupt:
        return fail("interrupted; run the same command again to resume", 130)


def shard(args: argparse.Namespace) -> int:
    # --- list and plan
    request = request_of(args)
    if args.source.is_dir() and args.out.resolve().is_relative_to(args.source.resolve()):
        raise SourceError(f"{args.out} lies inside {args.source}: choose an OUT beside it")
    planned = plan.known(args.out, request) or list_and_plan(request)
    describe(planned, args.part)
    if args.dry_run:
        return 0

    # --- what is missing
    target = Target(args.out, planned.spec)
    with target.lock(args.part):
        with target.exclusive():
            finished = target.begin()
            missing = target.missing(args.part)
            if missing and not (target.work / "plan.json").exists():
                planned.save(target.work)
        if missing and (made := len(target.part(args.part)) - len(missing)) > 0:
            print(f"resuming: {made} of {made + len(missing)} shards are done")

        # --- make it
        if missing and planned.gzipped:
            with pool.progress(planned.images(missing), "sorting") as shown:
                samples.fill_buckets(target, planned, missing, shown.add)
        pool.run(samples.ShardMaker(target, planned, request.rules), missing, planned.images(missing), args.workers)

        # --- finish
        with target.exclusive():
            refused = [(printable(name), reason) for name, reason in planned.refused]
            manifest = target.finish(refused, strict=args.strict)
            waiting = [] if manifest else target.missing()
    if manifest is None:
        print(f"this part is done; {len(waiting)} of {planned.spec.shards} shards are other parts' and not there yet")
    elif finished:
        again = f"; {len(missing)} lost shards made again" if missing else ""
        print(f"{args.out} is complete: {manifest['num_samples']:,} samples{again}")
    else:
        print(
            f"done: {manifest['num_samples']:,} samples in {len(manifest['shards'])} shards, "
            f"{manifest['repaired']} repaired, {manifest['quarantined']} quarantined -> {args.out}"
        )
        for what, count in manifest["counts"].items():
            print(f"  {count:,} {what}")
    return 0


def request_of(args: argparse.Namespace) -> sources.Request:
    fields = ("source", "split", "name", "labels", "label_offset", "unlabelled", "subset", "key", "seed", "shards")
    rules = Rules(short_side=args.short_side, quality=args.quality, max_pixels=args.max_pixels)
    return sources.Request(**{name: getattr(args, name) for name in fields}, class_list=args.classes, rules=rules)


def list_and_plan(request: sources.Request) -> plan.Plan:
    print(f"listing {request.source}", flush=True)
    with pool.progress(None, "listing") as shown:
        listing = sources.read(request, shown.add)
    planned = plan.build(listing, request)
    for note in listing.notes:
        print(f"note: {note}")
    for what, count in listing.ignored.items():
        print(f"ignored: {count:,} {what}")
    if listing.refused:
        name, reason = listing.refused[0]
        print(f"refused: {len(listing.refused):,} entries, e.g. {name!r} ({reason})")
    return planned


def describe(planned: plan.Plan, part: tuple[int, int]) -> None:
    spec, source = planned.spec, planned.spec.source
    classes = f"{len(spec.classes):,} classes" if spec.classes else "no labels"
    release = source["release"] or "no ImageNet release by its classes"
    print(f"{source['kind']}: {source['images']:,} images, {source['bytes'] / 1e9:.2f} GB, {classes}, {release}")
    print(
        f"{spec.shards} shards {spec.shard_file(0)} ... of about {source['bytes'] / spec.shards / 1e6:.1f} MB, "
        f"seed {spec.seed}" + (f"; part {part[0]} of {part[1]}" if part[1] > 1 else "")
    )


def verify(args: argparse.Namespace) -> int:
    differences = check.run(args.check, args.workers)
    for difference in differences:
        print(printable(difference))
    print(f"{args.check}: {f'{len(differences)} difference(s)' if differences else 'no difference'}")
    return int(bool(differences))


def fail(what: object, code: int) -> int:
    print(f"shard_imagenet: {printable(str(what))}", file=sys.stderr)
    return code


def arguments(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, nargs="?", metavar="SOURCE")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT")
    parser.add_argument(
        "--split", default="train", help="names the shards; val finds a val folder, too (default: train)"
    )
    parser.add_argument("--name", help="of the set (default: by the release, else the source's own name)")
    parser.add_argument(
        "--workers",
        type=positive,
        default=host.cores(),
        metavar="N",
        help="processes; more than cores help on slow disks (default: cores)",
    )
    parser.add_argument("--check", type=Path, metavar="OUT", help="verify a finished folder instead")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, write nothing")
    parser.add_argument("--strict", action="store_true", help="a quarantined image is an error: no manifest is written")
    which = parser.add_argument_group("which images")
    which.add_argument(
        "--classes", type=Path, metavar="FILE", help="only these classes, one a line; label = line number from 0"
    )
    which.add_argument(
        "--subset", type=positive, metavar="N", help="N random images by --seed; a smaller N is part of a larger one"
    )
    which.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="for flat folders: the devkit, LOC_val_solution.csv, or lines `<file> <label>`",
    )
    which.add_argument(
        "--label-offset", type=int, metavar="K", help="added to the integers of --labels (-1 where they begin at 1)"
    )
    which.add_argument("--unlabelled", action="store_true", help="all images below SOURCE, label -1")
    which.add_argument(
        "--key",
        choices=("stem", "path"),
        default="stem",
        help="what names a sample: its file's stem, or its path where stems repeat",
    )
    how = parser.add_argument_group("what is stored")
    how.add_argument("--short-side", type=positive, metavar="N", help="downsize to it, never up (re-encodes)")
    how.add_argument("--quality", type=quality, default=95, help="of JPEGs that are re-encoded (default: 95)")
    how.add_argument(
        "--max-pixels",
        type=positive,
        default=30_000_000,
        metavar="N",
        help="larger images are quarantined (default: 30,000,000)",
    )
    how.add_argument("--seed", type=seed, default=0, help="of the shuffle (default: 0)")
    how.add_argument("--shards", type=positive, metavar="N", help="(default: of 140 MB)")
    many = parser.add_argument_group("many machines")
    many.add_argument(
        "--part",
        type=part,
        metavar="I/N",
        help="this is part I of N (default: RANK and WORLD_SIZE, or the Slurm array's; 0/1 is the whole)",
    )
    args = parser.parse_args(argv)
    if args.check is None and (args.source is None or args.out is None):
        parser.error("SOURCE and OUT are needed (or --check OUT)")
    if not args.split.replace("_", "").isalnum() or (
        args.name and not args.name.replace("_", "").replace("-", "").isalnum()
    ):
        parser.error("--split and --name become file names: letters, digits and _ only")
    args.part = args.part or part_of_environment(parser)
    return args


def part_of_environment(parser: argparse.ArgumentParser) -> tuple[int, int]:
    """torchrun's rank, or the place in a Slurm array; (0, 1) elsewhere."""
    found = os.environ
    try:
        if "RANK" in found and "WORLD_SIZE" in found:
            return part(f"{found['RANK']}/{found['WORLD_SIZE']}")
        if "SLURM_ARRAY_TASK_ID" in found and "SLURM_ARRAY_TASK_COUNT" in found:
            step = int(found.get("SLURM_ARRAY_TASK_STEP", 1))
            place = (int(found["SLURM_ARRAY_TASK_ID"]) - int(found.get("SLURM_ARRAY_TASK_MIN", 0))) // step
            return part(f"{place}/{found['SLURM_ARRAY_TASK_COUNT']}")
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(f"RANK/WORLD_SIZE or SLURM_ARRAY_TASK_* in the environment make no part ({error}); say --part I/N")
    return 0, 1


def part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not slash or not number.isdigit() or not count.isdigit() or int(number) >= int(count):
        raise argparse.ArgumentTypeError(f"{text!r} is no part: say 0/4, 1/4, 2/4 or 3/4 for one of four")
    return int(number), int(count)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def seed(text: str) -> int:
    if not text.removeprefix("-").isdecimal() or not -(2**63) <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of 64 bits")
    return int(text)


def quality(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no JPEG quality (1 to 100)")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
