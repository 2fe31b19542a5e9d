"""Resolution of a spec to tars, and the manifests beside them.

A spec is a directory, a brace pattern, a tar, or a list of these. A directory with several splits needs the name of
one split.
"""

import argparse
import os
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from .host import read_json

Spec = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_MOST_SHARDS = 1_000_000  # limit for one range of a pattern
_SCHEMES = ("s3://", "gs://", "az://", "http://", "https://")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class ShardError(ValueError):
    """A shard set cannot be used; the message says why and names a remedy."""


def is_address(text: str) -> bool:
    """Return whether `text` is an address in a bucket or on a web server."""
    return text.lower().startswith(_SCHEMES)


def with_split(entry: str) -> tuple[str, str | None]:
    """Split ``DIRECTORY:SPLIT`` in two. An existing path, a pattern or an address with a port is left whole."""
    spec, colon, split = entry.rpartition(":")
    has_path = is_address(spec) and spec.count("/") > 2
    if not colon or "/" in split or "}" in split or Path(entry).exists() or not (has_path or Path(spec).is_dir()):
        return entry, None
    return spec, split


def expand(pattern: str) -> list[str]:
    """Expand a brace pattern: ``a{00..02}b{x,y}`` -> a00bx, a00by, a01bx ..."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    if numbers := _RANGE.fullmatch(found[1]):
        low, high = (int(text) for text in numbers.groups())
        if high < low:
            raise ShardError(f"{pattern!r}: the range {found[0]} ends before it begins")
        if high - low >= _MOST_SHARDS:
            raise ShardError(f"{pattern!r} names {high - low + 1} shards: {_MOST_SHARDS} are the most")
        choices = [str(k).zfill(len(numbers[1])) for k in range(low, high + 1)]
    elif "," in found[1]:
        choices = found[1].split(",")
    else:
        raise ShardError(f"{pattern!r}: {found[0]} is neither a range {{0000..0099}} nor a list {{a,b}}")
    return list(chain.from_iterable(expand(pattern[: found.start()] + c + pattern[found.end() :]) for c in choices))


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse `argv`. Exits with a message if words are left over; the likely cause is a pattern without quotes."""
    args, rest = parser.parse_known_args(argv)
    if rest and rest[0].startswith("-"):
        parser.error(f"unknown option {rest[0]}")
    if rest:
        more = f" and {len(rest) - 1:,} more" * (len(rest) > 1)
        parser.error(f"one word too many, {rest[0]!r}{more}: the shell expands a pattern that is not in quotes")
    return args


def resolve(entries: Sequence[str], split: str | None) -> tuple[list[Path], dict | None]:
    """Return the tars that `entries` name, and the manifest if they are a split of one."""
    try:
        return _resolve(entries, split)
    except OSError as error:
        raise ShardError(f"{error.filename} cannot be read: {error.strerror}") from None


def _resolve(entries: Sequence[str], split: str | None) -> tuple[list[Path], dict | None]:
    for entry in entries:
        if not entry:
            raise ShardError("an empty text names nothing: name a directory, a brace pattern or tars")
        if _ADDRESS.match(entry) and not Path(entry).exists():
            raise ShardError(
                f"{entry!r} is an address or a command that cannot be read image by image: name files or an address "
                f"that begins with {', '.join(_SCHEMES)}, or hand it to a Loader as a pipeline.Stream"
            )
    if len(entries) == 1 and Path(entries[0]).is_dir():
        return _in_directory(Path(entries[0]), split)
    paths = [Path(path) for entry in entries for path in ([entry] if Path(entry).exists() else expand(entry))]
    if not paths:
        raise ShardError("an empty list of shards: name a directory, a brace pattern or tars")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        if missing[0].is_dir():
            raise ShardError(f"{missing[0]} is a directory among tars: name one directory alone, or tars")
        raise ShardError(
            f"{missing[0]} is missing ({len(missing)} of {len(paths)} shards): "
            "check the path, or make shards with tools/shard_imagenet.py"
        )
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ShardError(f"{twice} is named twice: name each shard once")
    for manifest in find_manifests(paths[0].parent).values():
        if paths == [paths[0].parent / shard["file"] for shard in manifest["shards"]]:
            return paths, manifest
    return paths, None


def _in_directory(folder: Path, split: str | None) -> tuple[list[Path], dict | None]:
    manifests = find_manifests(folder)
    if manifests:
        manifest = manifests[one_split(str(folder), list(manifests), split)]
        return _listed_files(folder, [shard["file"] for shard in manifest["shards"]], "the manifest"), manifest
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ShardError(f"{folder} holds no .tar: name another, or make shards with tools/shard_imagenet.py")
    odd = next((path for path in paths if not path.is_file()), None)
    if odd:  # opening a pipe would hang
        raise ShardError(f"{odd} is a broken link or no regular file: remove it, or name the other tars by a pattern")
    infos = (folder / name for name in ("_info.json", "info.json"))
    info = next((info for path in infos if (info := read_json(path))), {})
    splits = timm_splits(info)
    if split is None and len(splits) <= 1:
        return paths, None
    return _listed_files(folder, splits[one_split(str(folder), list(splits), split)], "_info.json"), None


def one_split(folder: str, splits: Sequence[str], split: str | None) -> str:
    """Return the chosen split, or the only one. Raises ShardError if it is ambiguous or missing."""
    if split is None and len(splits) > 1:
        choices = " or ".join(f"{folder}:{name}" for name in splits)
        raise ShardError(f"{folder} holds the splits {', '.join(splits)}: name one, {choices}")
    if split is not None and split not in splits:
        raise ShardError(f"{folder} has no split {split!r}: it holds {', '.join(splits) or 'none that has a name'}")
    return splits[0] if split is None else split


def _listed_files(folder: Path, names: Sequence[str], where: str) -> list[Path]:
    paths = [folder / name for name in names]
    if not paths:
        raise ShardError(f"{folder}: {where} does not say which tars are this split: name them by a pattern")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ShardError(
            f"{missing[0]} is missing ({len(missing)} of the {len(paths)} shards that {where} lists): "
            "restore it, or name the remaining tars one by one"
        )
    return paths


def timm_splits(info: dict) -> dict[str, list[str]]:
    """Return the tars of each split in timm's _info.json; an empty list if it lists no valid file names."""
    splits, found = info.get("splits"), dict[str, list[str]]()
    for name, split in splits.items() if isinstance(splits, dict) else ():
        files = split.get("filenames") if isinstance(split, dict) else None
        files = files if isinstance(files, list) else []
        named = all(isinstance(file, str) and Path(file).name == file for file in files)
        found[str(name)] = files if named else []
    return found


def find_manifests(folder: Path) -> dict[str, dict]:
    """Return our sharder's manifests in a folder, by split. Other files of that name are ignored."""
    found = {}
    for path in sorted({folder / "manifest.json", *folder.glob("*.manifest.json")}):
        manifest = read_json(path)
        if manifest and is_manifest(manifest):
            found[str(manifest["split"])] = manifest
    return found


def is_manifest(manifest: dict) -> bool:
    """Return whether a JSON object is a manifest of our sharder, in format 1."""
    shards = manifest.get("shards")
    return (
        manifest.get("format") == 1
        and {"name", "split", "num_samples"} <= manifest.keys()
        and isinstance(shards, list)
        and len(shards) > 0
        and all(isinstance(shard, dict) and {"file", "bytes", "samples"} <= shard.keys() for shard in shards)
        and all(isinstance(shard["file"], str) and Path(shard["file"]).name == shard["file"] for shard in shards)
    )
