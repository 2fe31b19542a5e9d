#!/usr/bin/env python3
"""Converts images with segmentation masks into WebDataset tars of KEY.jpg and KEY.seg.png (class indices, 255 = void).

    python tools/shard_segmentation.py SOURCE OUT --layout voc --split train_aug    # shard; run it again to resume
    python tools/shard_segmentation.py --check OUT                                  # verify a finished folder

SOURCE: `--layout folders` is images/SPLIT, masks/SPLIT (gray PNGs of class indices) and classes.txt, one name per line.
Every other layout is a public data set as its archives unpack; docs/sharding.md lists the folders that each one needs.
OUT gets what tools/shard_imagenet.py writes, classes.txt, and the pixels and share of each class in the manifest.

These are refused with a message that names the file: a mask whose size differs from its image's; a mask with another
coding than the layout's (a palette or colours instead of indices); a number or colour that is no class; an image
without a mask, or a mask without an image. The same source and options give the same bytes, for any number of workers
and after any interruption. Exit code: 0 done, 1 failed or differences found, 2 wrong usage or unusable input.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from functools import partial
from pathlib import Path

from segmentation import layouts
from segmentation.pairs import pairs
from segmentation.samples import MEMBERS, ShardMaker
from segmentation.statistics import compare, look, statistics
from sharding import SourceError, bucket, check, command, plan
from sharding.images import Rules
from sharding.target import Spec


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return command.run("shard_segmentation", lambda: verify(args) if args.check else shard(args))


def shard(args: argparse.Namespace) -> int:
    maker = list_and_plan(args)
    if args.dry_run:
        return 0
    more = partial(statistics, maker.target.spec.classes)
    code = command.carry_out(maker.target, maker, args, images=maker.count, more=more)
    if manifest := maker.target.manifest():  # otherwise other parts are not finished
        rows = manifest["classes"]
        shares = [f"{name} {row['share']:.2f}" for name, row in rows.items() if row["pixels"]]
        print(f"{len(shares)} of {len(rows)} classes, in percent of the labelled pixels: {', '.join(shares)}")
        print(f"void: {manifest['void']['share']:.2f} percent of all pixels")
    return code


def verify(args: argparse.Namespace) -> int:
    differences = check.run(args.check, args.workers, MEMBERS, look, compare)
    return command.report(args.check, differences)


def list_and_plan(args: argparse.Namespace) -> ShardMaker:
    """List the source and assign pairs to shards: everything that is decided before the first image is read."""
    if not isinstance(args.source, Path) or not args.source.is_dir():
        raise SourceError(f"{args.source} is no folder: SOURCE is where the data set's archives are unpacked")
    if command.inside(args.out, args.source):
        raise SourceError(f"{args.out} lies inside {args.source}: choose an OUT beside it")
    layout = layouts.folders(args.source) if args.layout == "folders" else layouts.LAYOUTS[args.layout]
    print(f"listing {args.source}", flush=True)
    found = pairs(layout, args.source, args.split, args.list)
    order, _ = plan.shuffled((pair.image_key for pair in found), args.seed)  # a tile's patches stay together
    found = [found[position] for position in order]
    by_key = {pair.key: pair for pair in found}
    for pair in found:
        if by_key[pair.key] is not pair:
            raise SourceError(f"{pair.image} and {by_key[pair.key].image} have one key, {pair.key}: rename one of them")
    sizes = {name: (args.source / name).stat().st_size for pair in found for name in (pair.image, pair.mask)}
    rows = [[key, sizes[pair.image], sizes[pair.mask]] for key, pair in sorted(by_key.items())]
    content = hashlib.sha256(json.dumps([layout.classes, rows]).encode())
    size = sum(sizes.values())
    bounds = plan.bounds(len(found), size, args.shards)
    rules = Rules(subsampling="4:4:4")  # for PNGs that become JPEGs: small coloured objects are classes here
    spec = Spec(
        name=args.name or (plan.folder_name(args.source, args.split) if args.layout == "folders" else args.layout),
        split=args.split,
        shards=len(bounds) - 1,
        seed=args.seed,
        options={"layout": args.layout, "shards": len(bounds) - 1, **dataclasses.asdict(rules)},
        source={"images": len(found), "bytes": size, "sha256": content.hexdigest()},
        classes=list(layout.classes),
        class_file="classes.txt",
        members=MEMBERS,
    )
    published = layout.splits[args.split][1]
    if published not in (None, len(found)) and args.list is None:
        print(f"note: {args.layout} {args.split} has {published:,} samples as published, {args.source} {len(found):,}")
    print(
        f"{len(found):,} samples, {len(layout.classes)} classes, {size / 1e9:.2f} GB -> "
        f"{spec.shards} shards {spec.shard_file(0)} ..., seed {spec.seed}"
    )
    return ShardMaker(bucket.at(args.out, spec), layout, args.source.resolve(), found, bounds, rules)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    add = parser.add_argument_group("which images").add_argument
    add("--layout", choices=["folders", *layouts.LAYOUTS], help="data set: its folders and the coding of its masks")
    add("--list", type=Path, metavar="FILE", help="list of the split's images, one per line, instead of the layout's")
    args = command.parse(parser, argv)
    if not args.check and args.layout is None:
        parser.error("--layout is needed: folders, or the data set's")
    return args


if __name__ == "__main__":
    sys.exit(main())
