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
import dataclasses
import os
import sys
from pathlib import Path

from sharding import SourceError, check, finishing, images, plan, pool, sources, writing


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        return verify(args) if args.check else shard(args)
    except SourceError as error:
        return complain(error, 2)
    except (writing.Busy, RuntimeError) as error:
        return complain(error, 1)
    except OSError as error:
        what = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        return complain(f"{what}; nothing half-written is visible, the same command goes on from here", 1)
    except KeyboardInterrupt:
        return complain("interrupted; the same command goes on from here", 130)


def shard(args: argparse.Namespace) -> int:
    # --- what is there, and what goes where
    rules = images.Rules(short_side=args.short_side, quality=args.quality, max_pixels=args.max_pixels)
    if args.source.is_dir() and args.out.resolve().is_relative_to(args.source.resolve()):
        raise SourceError(f"{args.out} lies inside {args.source}: choose an OUT beside it")
    what = {"labels": args.labels, "label_offset": args.label_offset, "unlabelled": args.unlabelled}
    how = {"name": args.name, "split": args.split, "seed": args.seed, "class_list": args.classes, "shards": args.shards}
    how |= {"subset": args.subset, "key_style": args.key, "image_rules": dataclasses.asdict(rules)}
    request = plan.request_of(args.source, **what, **how)
    planned = plan.known(args.out, args.split, request)
    if planned is None:
        print(f"listing {args.source}", flush=True)
        with pool.progress(None, "listing") as shown:
            listing = sources.read(args.source, args.split, **what, told=shown.add)
        planned = plan.build(listing, request=request, **how)
        remarks(listing)
        del listing
    describe(planned, args.part)
    if args.dry_run:
        return 0
    mine = list(range(planned.shards))[args.part[0] :: args.part[1]]

    # --- make what is still missing
    work = target(planned, args.out)
    with writing.locked(work, args.part):
        with writing.alone(work):
            manifest = finishing.check_target(planned, args.out)
            if manifest is None and not (work / "plan.json").exists():
                planned.save(work)
        if manifest is None:
            missing = [one for one in mine if not finishing.done(planned, args.out, one)]
        else:  # finished before: only what was lost since
            whole = {entry["file"] for entry in manifest["shards"] if finishing.whole(args.out, entry)}
            lost = {entry["file"] for entry in manifest["shards"]} - whole
            missing = [one for one in mine if planned.shard_file(one) in lost]
            if missing:
                planned.save(work)
        if args.merge:
            missing = []
        if missing:
            if len(missing) < len(mine):
                print(f"going on: {len(mine) - len(missing)} of {len(mine)} shards are done")
            if planned.gzipped:
                images_in = sum(planned.bounds[one + 1] - planned.bounds[one] for one in missing)
                with pool.progress(images_in, "sorting") as shown:
                    writing.spool(planned, args.out, missing, shown.add)
            pool.run(planned, args.out, missing, rules, args.workers)
        return finish(planned, args, manifest, missing)


def finish(planned: plan.Plan, args: argparse.Namespace, manifest: dict | None, made: list[int]) -> int:
    # --- the set's metadata, once every part is done
    work = writing.work_folder(args.out, planned)
    if manifest is not None:
        wanted = {entry["file"]: entry["sha256"] for entry in manifest["shards"]}
        for one in made:
            entry = finishing.read_record(planned, args.out, one)["entry"]
            if entry["sha256"] != wanted[entry["file"]]:
                raise RuntimeError(
                    f"{entry['file']} came out different from the manifest: another Pillow than {manifest['codec']}?"
                )
        finishing.clean_up(planned, args.out)
        print(
            f"{args.out} is complete: {manifest['num_samples']:,} samples"
            + f"; {len(made)} lost shards made again" * bool(made)
        )
        if args.strict and manifest["quarantined"]:
            raise RuntimeError(f"--strict: {manifest['quarantined']} image(s) were quarantined when it was made")
        return 0
    with writing.alone(work):
        manifest = finishing.check_target(planned, args.out)  # another part may have been last, just now
        if manifest is None:
            waiting = [one for one in range(planned.shards) if not finishing.done(planned, args.out, one)]
            if waiting:
                print(
                    f"this part is done; {len(waiting)} of {planned.shards} shards are other parts' and not there yet"
                )
                return int(args.merge)
            manifest = finishing.merge(planned, args.out, strict=args.strict)
            if args.strict and manifest["quarantined"]:
                listed = finishing.own_file(args.out, args.split, "quarantine.jsonl")
                raise RuntimeError(
                    f"--strict: {manifest['quarantined']} image(s) quarantined ({listed}): no manifest is written"
                )
    finishing.clean_up(planned, args.out)
    print(
        f"done: {manifest['num_samples']:,} samples in {len(manifest['shards'])} shards, "
        f"{manifest['repaired']} repaired, {manifest['quarantined']} quarantined -> {args.out}"
    )
    for what, count in manifest["counts"].items():
        print(f"  {count:,} {what}")
    return 0


def verify(args: argparse.Namespace) -> int:
    differences = check.run(args.check, args.workers)
    for difference in differences:
        print(difference)
    print(f"{args.check}: {len(differences)} difference(s)" if differences else f"{args.check}: sound")
    return int(bool(differences))


def target(planned: plan.Plan, out: Path) -> Path:
    """The hidden work folder, which shows at once whether OUT can be written."""
    work = writing.work_folder(out, planned)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"cannot write to {out}: {error.strerror}; choose another OUT") from None
    return work


def remarks(listing: sources.Listing) -> None:
    for note in listing.notes:
        print(f"note: {note}")
    for what, count in listing.ignored.items():
        print(f"ignored: {count:,} {what}")
    if listing.refused:
        name, reason = listing.refused[0]
        print(f"refused: {len(listing.refused):,} entries, e.g. {name!r} ({reason})")


def describe(planned: plan.Plan, part: tuple[int, int]) -> None:
    source = planned.source
    classes = f"{len(planned.classes):,} classes" if planned.classes else "no labels"
    print(f"{source['kind']}: {source['images']:,} images, {source['bytes'] / 1e9:.2f} GB, {classes}")
    print(f"release: {source['release'] or 'none that is known'}")
    print(
        f"{planned.shards} shards {planned.shard_file(0)} ... "
        f"of about {source['bytes'] / planned.shards / 1e6:.1f} MB, seed {planned.seed}"
        + (f"; part {part[0]} of {part[1]}" if part[1] > 1 else "")
    )


def complain(what: object, code: int) -> int:
    print(f"shard_imagenet: {what}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
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
        default=len(os.sched_getaffinity(0)),
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
    many.add_argument(
        "--merge",
        action="store_true",
        help="only write the metadata, once all parts are done (the last part does by itself)",
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
