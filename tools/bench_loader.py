#!/usr/bin/env python3
"""Measures the loader's speed stage by stage, and says what limits it.

    python tools/bench_loader.py --shards SPEC --recipe loca --device cpu --batch-size 64 --num-threads 2 --seconds 10

Prints progress, a table, and as the last line one JSON object. Warm-up is not timed; variants to be compared are
measured alternately. "Stage alone": one stage in one thread, on the output of the previous stage. "Pipeline so far":
all stages up to this one, with all threads and prefetching. Exit code: 0 done, 2 wrong usage or unusable input.
"""

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any, get_args

from benchmarking import machine, meter, report, rivals, stages, sweeps

from pipeline import Recipe, ShardSet, cores, recipes
from pipeline.normalise import Pixels
from pipeline.specs import parse_args

RECIPES = ("loca", "vicregl", "vicregl_resnet50", "plain")
STAGES = ("read", "decode", "draw", "cut", "colour", "correspondences", "transfer", "whole loader")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shards", required=True, help="folder, brace pattern or tar")
    add("--recipe", default="loca", choices=(*RECIPES, "decode"), help="decode: read and decode only")
    add("--fidelity", choices=("paper", "released"), help="default: the recipe's default, which run.py uses, too")
    add("--device", default="cpu", help="cpu, cuda or cuda:1")
    add("--batch-size", type=int, default=64)
    add("--num-threads", type=int, default=cores(), help="threads of DALI; --against loaders get as many workers")
    add("--seconds", type=float, default=10.0, help="time to measure the whole loader; other stages take a share of it")
    add("--repeats", type=int, default=3, help="rounds of measuring; min and max are taken over the rounds")
    add("--order", default="global", choices=("global", "block"))
    add("--pixels", default="uint8", choices=get_args(Pixels), help="type of the views, also for --against loaders")
    add("--wanted", type=float, help="target in images/s: the verdict says how many cores it needs (default: 1000)")
    add("--hw-decoder-load", type=float, help="share of images decoded by a GPU's JPEG engines, 0 to 1")
    add("--step-ms", type=float, help="step time of the simulated consumer (default: 1.25 x the loader's batch time)")
    add("--against", default="", help=f"comma-separated loaders to compare with: {', '.join(rivals.NAMES)}; or all")
    add("--tune", action="store_true", help="search threads x hardware share, then prefetching, then batch size")
    add("--scaling", action="store_true", help="measure over threads, batch size, views and size of the set")
    add("--headspace", action="store_true", help="compare training on batches replayed from memory and on the loader")
    add("--method", default="loca", help="method that --headspace trains")
    add("--backbone", help="backbone for --headspace, if the method's default is too large for the machine")
    add("--json", type=Path, help="also write the result to this file")
    add("--compare", type=Path, help="earlier --json file to compare this run with")
    add("--chart", type=Path, help="write the stages as a PNG chart")
    return parse_args(parser, argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        result = run(args)
    except (ValueError, OSError) as error:
        print(f"bench_loader: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


def say(text: str) -> None:
    print(text, flush=True)


def run(args: argparse.Namespace) -> dict[str, Any]:
    numbers = (args.batch_size, args.num_threads, args.repeats, args.seconds, args.wanted or 1)
    if not all(0 < number < math.inf for number in numbers):
        raise ValueError("--batch-size, --num-threads, --repeats, --seconds and --wanted must be positive numbers")
    if args.recipe == "decode" and (args.tune or args.scaling or args.against):
        raise ValueError("--tune, --scaling and --against need a recipe with views, not 'decode'")
    recipe: Recipe | None = None
    if args.recipe != "decode":
        recipe = getattr(recipes, args.recipe)(**({"fidelity": args.fidelity} if args.fidelity else {}))
        args.fidelity = recipe.fidelity
    earlier = json.loads(args.compare.read_text()) if args.compare else None
    if earlier is not None:
        report.comparable(vars(args), earlier)
    for path in (args.json, args.chart):
        if path and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}")
    if args.chart and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--chart needs matplotlib: pip install -e '.[bench]'")
    if args.headspace:
        sweeps.headspace_config(args.method, args.backbone)
    task = stages.Task(
        ShardSet(args.shards),
        recipe,
        args.batch_size,
        args.num_threads,
        args.device,
        args.order,
        args.hw_decoder_load,
        args.pixels,
    )
    found = machine.describe()
    say(machine.line(found))
    say(describe_set(task))
    shuffle = {}
    for order in ("global", "block"):
        quality = shuffle[order] = task.loader(recipes.plain(), order=order, batch_size=1).shuffle_quality()
        distance, mixed = quality["spread"], quality["shards"]
        say(
            f"order {order}, relative to a uniform shuffle: distance between consecutive samples {distance:.2f}, "
            f"shards in a batch {mixed:.2f}"
        )
    result: dict[str, Any] = {name: getattr(args, name) for name in (*report.SETTINGS, "wanted", "seconds", "repeats")}
    result |= {
        "images_per_s": {},
        "stages": {},
        "machine": found,
        "shards": shard_figures(task),
        "shuffle": shuffle,
    }
    ladder(task, args, result)
    if recipe is not None:
        step = args.step_ms or 1.25 * 1e3 * args.batch_size / result["images_per_s"]["median"]
        result["memory_mb"] = stages.memory(task, args.shards)
        result["consumer"] = stages.consume(task, step, max(args.seconds / 3, 1.0))
    if args.tune:
        result["tune"] = sweeps.tune(task, max(args.seconds / 5, 1.0), say)
    if args.scaling:
        result["scaling"] = sweeps.scaling(task, args.seconds / 5, args.repeats, say)
    if args.headspace:
        result["headspace"] = sweeps.headspace(task, args.method, args.backbone, args.seconds / 3, args.repeats, say)
    conclude(args, result, earlier)
    return result


def ladder(task: stages.Task, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Measure all stages, alone and cumulatively, and the `--against` loaders in turns. Add the figures to `result`."""
    challengers = [rivals.meter(name, task) for name in rivals.chosen(args.against)]
    turn = args.seconds / args.repeats
    single = stages.alone(task, stages.Pool(task))
    meter.in_turns(single, turn, args.repeats, lambda text: say(f"stage alone, {text}"))
    so_far = stages.cumulative(task)
    read_before = machine.storage_bytes()
    meter.in_turns([*so_far, *challengers], turn, args.repeats, lambda text: say(f"pipeline so far, {text}"))
    whole = so_far[-1]
    images = sum(rate * turn * m.share for m in so_far for rate in m.rates)
    fetched = 100 * (machine.storage_bytes() - read_before) / (images * result["shards"]["mean_bytes"])
    for m in [*so_far, *challengers]:
        m.close()
    times = {m.name: [1000 / rate for rate in m.rates] for m in single}
    for both, first, second in (("cut + colour", "cut", "colour"), ("decode + cut", "decode", "cut")):
        if both in times:  # the second stage's time is the difference, round by round
            times[second] = [max(0.0, b - a) for a, b in zip(times[first], times.pop(both), strict=True)]
    summed = {m.name: m for m in so_far}
    for name in STAGES:
        stage: dict[str, Any] = {"alone_ms": meter.spread(times[name], 4)} if name in times else {}
        if name in summed:
            m = summed[name]
            stage |= {
                "images_per_s": m.rate,
                "cpu_s_per_1000": meter.spread(m.cpu, 3),
                "cores_busy": meter.spread(m.busy, 2),
            }
        if stage:
            result["stages"][name] = stage
    if challengers:
        result["against"] = {
            m.name: {
                "images_per_s": m.rate,
                "cpu_s_per_1000": meter.spread(m.cpu, 3),
                "ratio": round(whole.rate["median"] / m.rate["median"], 2),
            }
            for m in challengers
        }
    rate = whole.rate
    views = sum(cut.count for cut in task.recipe.cuts) if task.recipe else 1
    result |= {
        "images_per_s": rate,
        "views_per_s": round(rate["median"] * views),
        "mb_per_s": round(rate["median"] * result["shards"]["mean_bytes"] / 1e6, 1),
        "mp_per_s": round(rate["median"] * result["shards"]["mean_pixels"] / 1e6, 1),
        "cpu_s_per_1000": meter.spread(whole.cpu, 3),
        "feeding_ms": meter.spread(whole.feeding, 4),
        "latency_ms": whole.latency_ms,
        "from_storage_percent": round(fetched, 1),
        "cache": "warm" if fetched < 5 else "cold",
    }


def shard_figures(task: stages.Task) -> dict[str, float]:
    table = task.shards.table
    pixels = table["height"].astype(float) * table["width"]
    return {
        "images": len(table),
        "mean_bytes": round(float(table["size"].mean())),
        "mean_pixels": round(float(pixels.mean())),
        "mean_height": round(float(table["height"].mean()), 1),
        "mean_width": round(float(table["width"].mean()), 1),
    }


def describe_set(task: stages.Task) -> str:
    f = shard_figures(task)
    return (
        f"{f['images']} images of {f['mean_bytes'] / 1e3:.0f} kB and {f['mean_width']:.0f} x {f['mean_height']:.0f} "
        f"pixels on average"
    )


def conclude(args: argparse.Namespace, result: dict[str, Any], earlier: dict[str, Any] | None) -> None:
    result["verdict"] = report.verdict(result)
    say("")
    say(report.table(result))
    latency, rate = result["latency_ms"], result["images_per_s"]
    say(
        f"\n{rate['median']} images/s ({rate['min']} - {rate['max']}), {result['views_per_s']} views/s, "
        f"{result['mb_per_s']} MB/s, {result['mp_per_s']} MP/s; {result['cpu_s_per_1000']['median']} CPU-s per 1,000 "
        f"images; batch latency p50 {latency['p50']} p99 {latency['p99']} max {latency['max']} ms; "
        f"{result['cache']} cache"
    )
    if "memory_mb" in result:
        m = result["memory_mb"]
        say(f"memory of a process with this loader: {m['peak']:.0f} MB at its peak, {m['private']:.0f} MB private")
    if "consumer" in result:
        c = result["consumer"]
        say(f"a consumer of {c['step_ms']} ms per batch waits {c['wait_ms']} ms ({c['wait_percent']} %) for data")
    for name, rival in result.get("against", {}).items():
        say(f"{rival['ratio']} x {name}")
    if "tune" in result:
        say(f"best: {result['tune']['best']}")
    if "headspace" in result:
        say(f"headspace: {result['headspace']}")
    say(result["verdict"])
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    if earlier is not None:
        for text in report.compare(result, earlier):
            say(f"compared: {text}")
    if args.chart:
        report.chart(result, args.chart)


if __name__ == "__main__":
    sys.exit(main())
