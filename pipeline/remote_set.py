"""Resolution of addresses to shards, and the sample table of remote shards.

Our own sets have a manifest and a table, which are downloaded once. For other sets, each tar is downloaded once and
scanned. The tables are cached in the user's cache folder, and the tars in the shard cache as long as there is space.
"""

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import remote, specs, tables
from .host import digest, json_object
from .remote import Folder, Object
from .remote_files import RemoteFiles
from .shard_cache import Cache, Job, fetch
from .specs import ShardError

_LARGEST_JSON = 1 << 28  # bytes: enough for a manifest of a million shards
_log = logging.getLogger(__name__)


def open_set(
    entries: Sequence[str], split: str | None, root: Path | None, size: int
) -> tuple[list[Object], NDArray[np.void], RemoteFiles]:
    """Return the shards, their table (tables.SAMPLE rows) and their reader, with at most `size` bytes of cache in
    `root`. Raises ShardError, and ReadError if a server does not answer.
    """
    objects, manifest = resolve(entries, split)
    empty = next((o for o in objects if o.size == 0), None)
    if empty:
        raise ShardError(f"{empty} is empty: upload it again, or leave it out of the set")
    sums = {shard["file"]: shard.get("sha256") for shard in manifest["shards"]} if manifest else {}
    cache = Cache(root, objects, [sums.get(o.name) for o in objects], size)
    total = sum(o.size for o in objects)
    if cache.folder:
        _log.info("up to %.0f of %.0f GB are kept in %s", min(size, total) / 1e9, total / 1e9, cache.folder)
    return objects, table(objects, manifest, cache), RemoteFiles(objects, cache)


def resolve(entries: Sequence[str], split: str | None = None) -> tuple[list[Object], dict[str, Any] | None]:
    """Return the tars that `entries` name, and the manifest that lists them, if there is one. `entries` is a folder's
    address, or patterns and addresses of tars. Raises ShardError and ReadError.
    """
    if len(entries) == 1 and not entries[0].endswith(".tar") and "{" not in entries[0]:
        return remote.run(_in_folder(Folder(entries[0]), split))
    return remote.run(_named([address for entry in entries for address in specs.expand(entry)]))


async def _named(addresses: list[str]) -> tuple[list[Object], dict[str, Any] | None]:
    if len(set(addresses)) < len(addresses):
        twice = next(address for address in addresses if addresses.count(address) > 1)
        raise ShardError(f"{twice} is named twice: name each shard once")
    by_folder: dict[str, list[str]] = {}
    for address in addresses:
        url, _, name = address.rpartition("/")
        by_folder.setdefault(url, []).append(name)
    folders = {url: Folder(url) for url in by_folder}
    found = {}
    for url, names in by_folder.items():
        heads = await folders[url].heads(names)
        found.update({f"{url}/{name}": head for name, head in heads.items()})
    missing = [address for address in addresses if address not in found]
    if missing:
        raise ShardError(f"{missing[0]} is missing ({len(missing)} of {len(addresses)} shards): check the address")
    objects = [found[address] for address in addresses]
    if len(folders) == 1:
        for manifest in (await _manifests(objects[0].folder, None)).values():
            if {o.name for o in objects} <= {shard["file"] for shard in manifest["shards"]}:
                return _as_listed(objects, manifest)
    return objects, None


async def _in_folder(folder: Folder, split: str | None) -> tuple[list[Object], dict[str, Any] | None]:
    listed = await folder.list() if folder.lists else None
    if listed == {}:
        raise ShardError(f"{folder.url} holds nothing: check the address")
    manifests = await _manifests(folder, listed)
    others = {} if manifests else await _splits(folder)
    names = {name: [shard["file"] for shard in m["shards"]] for name, m in manifests.items()} or others
    if not names and listed is not None:
        names = {"": sorted(name for name in listed if name.endswith(".tar"))}
    if not names:
        raise ShardError(
            f"{folder.url}: a web server does not say what it holds, and there is no manifest.json or _info.json: "
            f"name the tars by a pattern, {folder.url}/NAME-{{0000..0099}}.tar"
        )
    split = specs.one_split(folder.url, list(names), split)
    wanted = names[split]
    found = listed if listed is not None else await folder.heads(wanted)
    missing = [name for name in wanted if name not in found]
    if missing or not wanted:
        what = f"{missing[0]} is missing ({len(missing)} of {len(wanted)} shards)" if missing else "there is no .tar"
        raise ShardError(f"{folder.url}: {what}: upload it, or name the tars by a pattern")
    objects = [found[name] for name in wanted]
    manifest = manifests.get(split)
    return _as_listed(objects, manifest) if manifest else (objects, None)


def _as_listed(objects: list[Object], manifest: dict[str, Any]) -> tuple[list[Object], dict[str, Any]]:
    sizes = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    for found in objects:
        if found.size != sizes[found.name]:
            raise ShardError(
                f"{found} has {found.size} bytes where its manifest says {sizes[found.name]}: upload it again"
            )
    return objects, manifest


async def _manifests(folder: Folder, listed: dict[str, Object] | None) -> dict[str, dict[str, Any]]:
    """Read our sharder's manifests, by split."""
    if listed is None and folder.lists:
        listed = await folder.list()
    if listed is not None:
        names = [n for n in sorted(listed) if n == "manifest.json" or n.endswith(".manifest.json")]
    else:
        names = ["manifest.json", *(f"{split}.manifest.json" for split in await _splits(folder))]
    found = {}
    for name in names:
        manifest = await _json(folder, name)
        if manifest and specs.is_manifest(manifest):
            found[str(manifest["split"])] = manifest
    return found


async def _splits(folder: Folder) -> dict[str, list[str]]:
    """Read the tars of each split from timm's _info.json."""
    info = await _json(folder, "_info.json") or await _json(folder, "info.json") or {}
    return specs.timm_splits(info)


async def _json(folder: Folder, name: str) -> dict[str, Any] | None:
    found = await folder.head(name)
    if found is None or found.size > _LARGEST_JSON:
        return None
    return json_object(await found.read(0, found.size))


def table(objects: Sequence[Object], manifest: dict[str, Any] | None, cache: Cache) -> NDArray[np.void]:
    """Return the sample table of the shards. Raises ShardError and ReadError."""
    if manifest:
        found = remote.run(objects[0].folder.head(f"{manifest['name']}-{manifest['split']}.samples.npy"))
        if found:
            rows = _fetched(found, manifest)
            place = {shard["file"]: k for k, shard in enumerate(manifest["shards"])}
            numbers = [place[o.name] for o in objects]
            if numbers == list(range(len(place))):
                return rows
            ends = np.searchsorted(rows["shard"], range(len(place) + 1))
            return tables.joined([rows[ends[k] : ends[k + 1]] for k in numbers])
    return _walked(objects, cache)


def _keep(rows: NDArray[np.void], name: str, count: int) -> NDArray[np.void]:
    """Cache a table for the next start. Returns it memory-mapped, so all processes of a machine share the memory."""
    tables.keep(rows, name)
    kept = tables.cached(name, count)
    return rows if kept is None else kept


def _fetched(found: Object, manifest: dict[str, Any]) -> NDArray[np.void]:
    """Download the table beside the shards, and cache it in the user's cache folder."""
    count = len(manifest["shards"])
    kept = f"{digest([str(found), found.size, found.version])}.npy"
    rows = tables.cached(kept, count) if found.version else None
    if rows is None:
        parts = [remote.submit(found.read(k, k + remote.PART)) for k in range(0, found.size, remote.PART)]
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / kept
            file.write_bytes(b"".join(map(remote.wait, parts)))
            rows = tables.load(file, count)
            if rows is not None:
                rows = _keep(np.array(rows), kept, count)
    if rows is None or len(rows) != manifest["num_samples"]:
        raise ShardError(f"{found} does not match the manifest: upload it again")
    return rows


def _walked(objects: Sequence[Object], cache: Cache) -> NDArray[np.void]:
    """Return the table of tars without tables: from the user's cache folder, or by downloading and scanning them."""
    names = [f"{digest([tables.SCAN, str(o), o.size, o.version])}.npy" for o in objects]
    found: dict[int, NDArray[np.void]] = {}

    def walk(shard: int, path: Path) -> None:
        rows, walked = tables.scan(path)
        tables.report(str(objects[shard]), objects[shard].size, walked, alone=len(objects) == 1)
        found[shard] = rows if walked.notes or not objects[shard].version else _keep(rows, names[shard], 1)

    def jobs(missing: list[int]) -> Iterator[Job]:
        for shard in missing:
            if (file := cache.open(shard)) is not None:
                os.close(file)
                walk(shard, cache.path(shard))
            else:
                yield cache.job(shard, None if cache.make_space(shard) else Path(scratch))

    while True:
        for k, name in enumerate(names):
            if k not in found and (rows := tables.cached(name, 1)) is not None:
                found[k] = rows
        missing = [k for k in range(len(objects)) if k not in found]
        if not missing:
            return tables.joined([found[k] for k in range(len(objects))])
        if cache.folder and not cache.owned():  # another process of this machine is scanning them
            time.sleep(0.2)
            continue
        size = sum(objects[k].size for k in missing)
        _log.info(
            "%d shards have no table: downloading them once, %.1f GB, to find their images",
            len(missing),
            size / 1e9,
        )
        with tempfile.TemporaryDirectory() as scratch:
            for job in fetch(jobs(missing)):
                walk(job.number, job.path)
                if job.path.parent == Path(scratch):
                    job.path.unlink()
        cache.release()
