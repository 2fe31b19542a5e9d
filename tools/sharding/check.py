"""Compares every byte of a finished folder with its manifests. At an address, a worker fetches one shard at a time."""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline import host, remote, tar
from pipeline.remote import Folder
from pipeline.shard_cache import Job, fetch
from pipeline.shards import SAMPLE
from pipeline.specs import ShardError

from . import SourceError, places, pool, writer
from .places import Place
from .target import fault, named, timm_splits

_LARGEST = 1 << 28  # bytes read of one member, at most
_MEMBERS = ("jpg", "cls", "json")
_OLDER = {"members": [*_MEMBERS], "class_file": "synsets.txt"}  # defaults for older manifests


class Found(NamedTuple):
    """The facts in a sample's members, and the differences found. `sums` are added up over the split."""

    height: int = 0
    width: int = 0
    label: int = -1
    differences: tuple[str, ...] = ()
    sums: Mapping[str, int] | None = None


# Examines one sample: (key, extension -> content, class names). Must be picklable.
Look = Callable[[str, Callable[[str], bytes], list[str]], Found]
# (folder with the class list, manifest, sums) -> differences of the whole split
Compare = Callable[[Path, dict, Counter], list[str]]


def labelled_image(key: str, read: Callable[[str], bytes], classes: list[str]) -> Found:
    """Examine an image with `cls` and `json`: its label must be in range and match the class named in the JSON."""
    differences = []
    try:
        metadata = json.loads(read("json"))
        label, height, width = int(read("cls")), int(metadata["height"]), int(metadata["width"])
        if max(abs(label), abs(height), abs(width)) >= 2**31:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        return Found(differences=(f"{key}.json or {key}.cls is not what was written",))
    if not -1 <= label < len(classes) or (label < 0) != (not classes):
        return Found(height, width, -1, (f"label {label} of {key} is out of range ({len(classes)} classes)",))
    if label >= 0 and metadata.get("synset") != classes[label]:
        differences.append(f"{key} is of {metadata.get('synset')}, synsets.txt says {classes[label]}")
    if metadata.get("label") != label:
        differences.append(f"{key}.json and {key}.cls give different labels")
    return Found(height, width, label, tuple(differences))


def run(
    out: Place,
    workers: int,
    members: tuple[str, ...] = _MEMBERS,
    look: Look = labelled_image,
    compare: Compare = lambda folder, manifest, sums: [],
) -> list[str]:
    """Return all differences, one sentence each; an empty list if the folder is unchanged.

    Raises SourceError if there is no manifest, or if its samples have other `members`. Raises ReadError if a server
    does not answer.
    """
    try:
        return _run(_Folder(out) if isinstance(out, Path) else _AtAddress(out), workers, members, look, compare)
    except ShardError as error:  # an address that cannot be read
        raise SourceError(str(error)) from None


def _run(out: "_Folder", workers: int, members: tuple[str, ...], look: Look, compare: Compare) -> list[str]:
    folders, files = out.names()
    found = [name for name in files if name == "manifest.json"] + [n for n in files if n.endswith(".manifest.json")]
    if not found:
        unfinished = ": the run that writes it is unfinished" if any(f.endswith(".work") for f in folders) else ""
        raise SourceError(f"{out} holds no manifest.json{unfinished or ': this tool has not finished a set there'}")
    differences, manifests = list[str](), dict[str, dict]()
    with out.fetched(found) as here:
        for name in found:
            manifest = _OLDER | (host.read_json(here / name) or {})
            if wrong := fault(manifest):
                differences.append(f"{name}: {wrong}")
                continue
            if (theirs := manifest["members"]) != list(members):
                made = "tools/shard_segmentation.py" if "seg.png" in str(theirs) else "tools/shard_imagenet.py"
                raise SourceError(f"{out}/{name} lists samples of {theirs}: check them with {made}")
            manifests[name] = manifest
    beside = {*found, "_info.json", "quarantine.jsonl"}
    for manifest in manifests.values():
        beside |= {manifest["class_file"], _table_file(manifest), f"{manifest['split']}.quarantine.jsonl"}
    with out.fetched(beside) as here:
        for name, manifest in manifests.items():
            differences += _split(out, here / name, manifest, workers, look, compare)
    listed = {entry["file"] for manifest in manifests.values() for entry in manifest["shards"]}
    return differences + [f"{name}: in no manifest" for name in files if name.endswith(".tar") and name not in listed]


class _Folder:
    """A finished folder on this machine; pickled to workers."""

    def __init__(self, out: Place):
        self.out = out

    def __str__(self) -> str:
        return str(self.out)

    def names(self) -> tuple[list[str], list[str]]:
        """The names of its folders and of its files."""
        return places.entries(self.out) if self.out.is_dir() else ([], [])

    @contextmanager
    def fetched(self, names: Iterable[str]) -> Iterator[Path]:
        """Yield a folder on this machine that contains the named files, as far as they exist."""
        assert isinstance(self.out, Path)
        yield self.out


class _AtAddress(_Folder):
    """A finished folder in a bucket or on a web server; a web server cannot list files."""

    def names(self) -> tuple[list[str], list[str]]:
        folder = Folder(str(self.out))
        if folder.lists:
            return super().names()
        with self.fetched(["_info.json"]) as here:
            splits = timm_splits(here)
        names = ["manifest.json", *(f"{split}.manifest.json" for split in splits)]
        return [], [*remote.run(folder.heads(names))]

    @contextmanager
    def fetched(self, names: Iterable[str]) -> Iterator[Path]:
        found = remote.run(Folder(str(self.out)).heads(sorted({*names})))
        with tempfile.TemporaryDirectory() as scratch:
            here = Path(scratch)
            for one in found.values():
                (here / one.name).touch()  # `fetch` skips empty files
            for _ in fetch(Job(0, one, here / one.name) for one in found.values() if one.size):
                pass
            yield here


def _table_file(manifest: dict) -> str:
    return f"{manifest['name']}-{manifest['split']}.samples.npy"


def _split(out: _Folder, path: Path, manifest: dict, workers: int, look: Look, compare: Compare) -> list[str]:
    here, shards = path.parent, manifest["shards"]
    class_file = here / manifest["class_file"]
    job = _Shard(out, _classes(class_file), manifest["members"], look)
    differences, tables, sums = list[str](), list[np.ndarray](), Counter[str]()
    with (
        pool.Progress(manifest["num_samples"], f"checking {manifest['split']}") as progress,
        ProcessPoolExecutor(max(1, min(workers, len(shards))), get_context("spawn")) as processes,
    ):
        for entry, (found, table, more) in zip(shards, processes.map(job, shards), strict=True):
            table["shard"] = len(tables)
            differences += found
            tables.append(table)
            sums.update(more)
            progress.add(len(table), entry["bytes"])
    total = sum(map(len, tables))
    if total != manifest["num_samples"]:
        differences.append(f"{path.name}: says {manifest['num_samples']} samples, the tars hold {total}")
    if tables:
        differences += _table(here / _table_file(manifest), np.concatenate(tables))
    info = timm_splits(here).get(manifest["split"], {})
    wanted = [[one["file"] for one in shards], [one["samples"] for one in shards], manifest["num_samples"]]
    if [info.get(field) for field in ("filenames", "shard_lengths", "num_samples")] != wanted:
        differences.append(f"_info.json: says something else about split {manifest['split']!r}")
    if manifest["num_classes"] and (count := len(_classes(class_file))) != manifest["num_classes"]:
        differences.append(f"{class_file.name}: {count} classes, the manifest says {manifest['num_classes']}")
    return differences + _quarantine(here, manifest) + compare(here, manifest, sums)


def _classes(file: Path) -> list[str]:
    return file.read_text("utf-8", "surrogateescape").splitlines() if file.is_file() else []


def _quarantine(out: Path, manifest: dict) -> list[str]:
    file = named(out, manifest["split"], "quarantine.jsonl")
    try:
        keys = [json.loads(line)["key"] for line in file.read_text().splitlines()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [f"{file.name}: missing, or not what was written"]
    count = manifest["quarantined"]
    return [] if len(keys) == count else [f"{file.name}: {len(keys)} images, the manifest says {count}"]


@dataclass(frozen=True)
class _Shard:
    """Checks one shard; pickled to workers."""

    out: _Folder
    classes: list[str]
    members: list[str]
    look: Look

    def __call__(self, entry: dict) -> tuple[list[str], np.ndarray, Counter]:
        """Return the differences, the table computed from the tar itself, and the samples' sums."""
        file = Path(entry["file"])
        beside = [file.with_suffix(suffix).name for suffix in (".idx", ".samples.npy")]
        with self.out.fetched([file.name, *beside]) as here:
            return self._checked(here / file, entry)

    def _checked(self, path: Path, entry: dict) -> tuple[list[str], np.ndarray, Counter]:
        sums = Counter[str]()
        if not path.is_file():
            return [f"{path.name}: missing"], np.empty(0, SAMPLE), sums
        differences = []
        if (size := path.stat().st_size) != entry["bytes"]:
            differences.append(f"{path.name}: {size} bytes, the manifest says {entry['bytes']}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                differences.append(f"{path.name}: sha256 differs from the manifest's")
        samples: dict[str, dict[str, tar.Member]] = {}
        rows, index = [], []
        with closing(tar.PlainFile(path)) as source:
            walk = tar.Walk(source, strict=False)
            for member in walk:
                key, _, extension = member.name.partition(".")
                if extension in samples.setdefault(key, {}):
                    differences.append(f"{path.name}: {member.name} is there twice")
                samples[key][extension] = member
            differences += [f"{path.name}: {note}" for note in walk.notes]
            for key, parts in samples.items():
                if list(parts) != self.members:
                    wanted = f"{', '.join(parts)} instead of {', '.join(self.members)}"
                    differences.append(f"{path.name}: sample {key} has {wanted}")
                    continue

                def read(extension: str, parts: dict[str, tar.Member] = parts) -> bytes:
                    return source.read_at(parts[extension].offset, min(parts[extension].size, _LARGEST))

                found = self.look(key, read, self.classes)
                differences += [f"{path.name}: {difference}" for difference in found.differences]
                sums.update(found.sums or {})
                image = parts[self.members[0]]
                rows.append((0, image.offset, image.size, found.height, found.width, found.label))
                index.append(writer.index_line([(end, p.offset, p.size, p.name) for end, p in parts.items()]))
        if len(samples) != entry["samples"]:
            differences.append(f"{path.name}: {len(samples)} samples, the manifest says {entry['samples']}")
        beside = path.with_suffix(".idx")
        if not beside.is_file() or beside.read_bytes() != writer.index_bytes(index):
            differences.append(
                f"{beside.name}: {'is not the index of ' + path.name if beside.is_file() else 'missing'}"
            )
        table = np.array(rows, dtype=SAMPLE)
        return differences + _table(path.with_suffix(".samples.npy"), table), table, sums


def _table(path: Path, wanted: np.ndarray) -> list[str]:
    """Compare a saved table. It is never unpickled: an object array counts as unreadable."""
    if not path.is_file():
        return [f"{path.name}: missing"]
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        return [f"{path.name}: unreadable ({error})"]
    same = found.dtype == wanted.dtype and found.shape == wanted.shape and found.tobytes() == wanted.tobytes()
    return [] if same else [f"{path.name}: differs from what the tars hold"]
