#!/usr/bin/env python3
"""Converts ImageNet (1k, 21k) or any folder of images into shuffled WebDataset tars, and verifies that each decodes.

    python tools/shard_imagenet.py SOURCE OUT --split train          # shard; run it again to resume after a stop
    python tools/shard_imagenet.py SOURCE OUT --split val --labels DEVKIT_OR_CSV
    python tools/shard_imagenet.py --check OUT                       # verify every byte of a finished folder

SOURCE: a folder of class folders, Kaggle's layout, ILSVRC2012_img_train.tar or _val.tar or the folder with them,
ImageNet-21k as a (gzipped) tar of class tars, a folder of class tars or of class folders, or unlabelled images; or
the address of any of these in a bucket (s3://, gs://, az://), or of a tar on a web server (http(s)://).
OUT gets <name>-<split>-0000.tar ..., a DALI index (.idx) and a sample table (.samples.npy) for each tar, timm's
_info.json, manifest.json (sha256 of each shard), synsets.txt and quarantine.jsonl (omitted images, and why).

The same source and options give the same bytes, for any number of workers and after any interruption. On many machines,
start the same command under torchrun or as a Slurm array: each takes its part, and the last one finishes the set.
Exit code: 0 done, 1 failed or differences found, 2 wrong usage or unusable input.
"""

import argparse
import sys
from pathlib import Path

from sharding import SourceError, bucket, check, command, plan, pool, printable, samples, sources
from sharding.images import Rules
from sharding.target import Target


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.check:
        return command.run("shard_imagenet", lambda: command.report(args.check, check.run(args.check, args.workers)))
    return command.run("shard_imagenet", lambda: shard(args))


def shard(args: argparse.Namespace) -> int:
    fields = ("source", "split", "name", "labels", "label_offset", "unlabelled", "subset", "key", "seed", "shards")
    rules = Rules(short_side=args.short_side, quality=args.quality, max_pixels=args.max_pixels)
    request = sources.Request(**{name: getattr(args, name) for name in fields}, class_list=args.classes, rules=rules)
    if command.inside(args.out, args.source):
        raise SourceError(f"{args.out} lies inside {args.source}: choose an OUT beside it")
    planned = list_and_plan(request)
    describe(planned, args.part)
    if args.dry_run:
        return 0
    target = bucket.at(args.out, planned.spec)
    make = samples.ShardMaker(target, planned, rules)
    refused = [(printable(name), reason) for name, reason in planned.refused]
    return command.carry_out(
        target,
        make,
        args,
        images=planned.images,
        prepare=lambda missing: prepare(target, planned, missing),
        refused=refused,
    )


def prepare(target: Target, planned: plan.Plan, missing: list[int]) -> None:
    """Write the workers' input to the work folder: the plan, and the images of a .tar.gz."""
    if not (target.work / "rows.npy").exists():
        planned.save(target.work)
    if planned.gzipped:
        with pool.Progress(planned.images(missing), "sorting") as progress:
            samples.unpack(target, planned, missing, progress.add)


def list_and_plan(request: sources.Request) -> plan.Plan:
    print(f"listing {request.source}", flush=True)
    with pool.Progress(None, "listing") as progress:
        listing = sources.read(request, progress.add)
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
    release = source["release"] or "not a known ImageNet release"
    print(f"{source['kind']}: {source['images']:,} images, {source['bytes'] / 1e9:.2f} GB, {classes}, {release}")
    print(
        f"{spec.shards} shards {spec.shard_file(0)} ... of about {source['bytes'] / spec.shards / 1e6:.1f} MB, "
        f"seed {spec.seed}" + (f"; part {part[0]} of {part[1]}" if part[1] > 1 else "")
    )


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    add = parser.add_argument_group("which images").add_argument
    add("--classes", type=Path, metavar="FILE", help="only these classes, one per line; label = line number from 0")
    text = "only N random images, chosen by --seed; a smaller subset is part of a larger one"
    add("--subset", type=command.integer(1), metavar="N", help=text)
    text = "for flat folders: the devkit, LOC_val_solution.csv, or lines `<file> <label>`"
    add("--labels", type=Path, metavar="FILE", help=text)
    text = "added to integer labels of --labels (-1 if they begin at 1)"
    add("--label-offset", type=command.integer(-(2**31), 2**31), metavar="K", help=text)
    add("--unlabelled", action="store_true", help="take all images below SOURCE, with label -1")
    text = "sample key: the file's stem or its path; auto: the path if stems repeat"
    add("--key", choices=("auto", "stem", "path"), default="auto", help=text)
    add = parser.add_argument_group("what is stored").add_argument
    add("--short-side", type=command.integer(1), metavar="N", help="downsize larger images to this (re-encodes)")
    add("--quality", type=command.integer(1, 100), default=95, help="JPEG quality of re-encoded images (default: 95)")
    text = "quarantine images with more pixels (default: 30,000,000)"
    add("--max-pixels", type=command.integer(1), default=Rules.max_pixels, metavar="N", help=text)
    return command.parse(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
