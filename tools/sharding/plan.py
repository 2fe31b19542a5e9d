"""Everything that is decided before the first image is read: labels, keys, order, subset, shards.

Samples are sorted by a keyed hash of their keys, so the order depends only on the seed and the set of keys. A folder,
a tar of class tars and a .tar.gz of the same images give the same shards, on any machine.
"""

import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline import host
from pipeline.remote import Object

from . import SourceError, labels
from .places import Place
from .sources import Listing, Request
from .target import Spec

SHARD_BYTES = 140_000_000  # the mean of timm's 1,024 shards of ImageNet-1k
_FEW_CLASSES = 100_000  # a label file may have this many classes for any number of images
_CLEAN = re.compile(r"[A-Za-z0-9_-]{1,80}")


@dataclass(frozen=True)
class Item:
    """One image still to be read. `tar` is an index into `Plan.tars`, or -1 for the file `name` below the root."""

    key: str
    name: str
    tar: int
    offset: int
    size: int
    label: int


@dataclass
class Plan:
    """The assignment of images to shards. `rows` is in the order of the output."""

    spec: Spec
    root: Place
    tars: list[Path | Object]
    gzipped: bool
    bounds: list[int]  # shard s holds rows[bounds[s]:bounds[s + 1]]
    refused: list[tuple[str, str]]  # (name, reason)
    rows: np.ndarray
    names: bytearray

    def images(self, shards: Iterable[int]) -> int:
        return sum(self.bounds[shard + 1] - self.bounds[shard] for shard in shards)

    def save(self, folder: Path) -> None:
        """Write the columns for `load`. rows.npy is written last: if it exists, both files are complete."""
        host.write_atomic(folder / "names.npy", lambda file: np.save(file, np.frombuffer(self.names, np.uint8)))
        host.write_atomic(folder / "rows.npy", lambda file: np.save(file, self.rows))


def load(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the saved rows and names, memory-mapped, so that a worker loads only what it reads."""
    rows, names = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("rows", "names"))
    return rows, names


def items(rows: np.ndarray, names: np.ndarray, key_style: str) -> Iterator[Item]:
    for row in rows:
        start = int(row["name_at"])
        name = os.fsdecode(bytes(names[start : start + int(row["name_bytes"])]))
        key = clean_key(name, key_style)
        yield Item(key, name, int(row["tar"]), int(row["offset"]), int(row["size"]), int(row["label"]))


def clean_key(name: str, style: str) -> str:
    """Return a sample's key: the file's stem if `style` is "stem", else its path.

    A WebDataset key is ASCII, has no dots or blanks and fits a USTAR name. If that changes the name, eight digits of
    its hash are appended, so that different names keep different keys.
    """
    if style == "stem":
        text = os.path.splitext(name.rpartition("/")[2])[0]  # noqa: PTH122 - called once per image, pathlib is slow
    else:
        text = str(PurePosixPath(name).with_suffix("")).replace("/", "_")
    if _CLEAN.fullmatch(text):
        return text
    digest = hashlib.blake2b(os.fsencode(text), digest_size=4).hexdigest()
    return f"{re.sub('[^A-Za-z0-9_-]', '_', text)[:80]}-{digest}"


def shuffled(keys: Iterable[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of the keys, i64 (n,), and their hashes in that order, u64 (n, 2). Equal hashes are adjacent."""
    key_bytes, digests = seed.to_bytes(8, "little", signed=True), bytearray()
    for key in keys:
        digests += hashlib.blake2b(key.encode(), digest_size=16, key=key_bytes).digest()
    digest = np.frombuffer(digests, "<u8").reshape(-1, 2)
    order = np.lexsort((digest[:, 1], digest[:, 0]))
    return order, digest[order]


def bounds(samples: int, size: int, shards: int | None) -> list[int]:
    """Return where each shard begins, and where the last one ends, for `samples` with `size` bytes in total.

    By default a shard has 140 MB. A small set gets up to 16 shards of about 100 samples or more, for several workers.
    """
    if shards is None:
        shards = max(math.ceil(size / SHARD_BYTES), min(16, math.ceil(samples / 100)))
    elif shards > samples:
        raise SourceError(f"--shards {shards}: there are only {samples} images")
    return [samples * shard // shards for shard in range(shards + 1)]


def build(listing: Listing, request: Request) -> Plan:
    """Build the plan of a listing. Raises SourceError for duplicate keys, labels out of range and empty classes."""
    class_list = request.class_list or listing.class_file
    classes, label = _labels(listing, labels.read_classes(class_list) if class_list else None)
    for one in classes:
        if one.splitlines() != [one]:
            raise SourceError(f"{listing.root}: class name {one!r} is no single line, as synsets.txt has it: rename it")
    kept = np.flatnonzero(label > -2)
    if not len(kept):
        raise SourceError(f"{listing.root}: no image belongs to a class of {class_list}")
    if dropped := len(listing) - len(kept):
        listing.notes.append(f"{dropped:,} images of classes that are not in the class list are left out")

    def ordered(key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the results of `shuffled`, and the positions that are followed by an equal key."""
        order, ranked = shuffled((clean_key(listing.name(int(row)), key) for row in kept), request.seed)
        return order, ranked, np.flatnonzero((ranked[1:] == ranked[:-1]).all(axis=1))

    release, key = labels.release(classes), "path" if request.key == "path" else "stem"
    order, ranked, same = ordered(key)
    if len(same) and request.key == "auto" and not release:  # in a release, a repeated stem is a repeated image
        listing.notes.append("file names repeat in other folders: a sample's key is made of its path (--key path)")
        key = "path"
        order, ranked, same = ordered(key)
    if len(same):
        first, second = (int(kept[order[same[0] + step]]) for step in (0, 1))
        remedy = "; --key path tells them apart" if key == "stem" else ""
        raise SourceError(
            f"{len(same):,} duplicate key(s): {clean_key(listing.name(first), key)!r} "
            f"is {listing.place(first)!r} and {listing.place(second)!r}{remedy}"
        )
    if request.subset is not None:
        if request.subset > len(order):
            raise SourceError(f"--subset {request.subset}: the source has only {len(order)} images")
        order, ranked = order[: request.subset], ranked[: request.subset]

    rows = listing.table[kept[order]]
    rows["label"] = label[kept[order]]
    size = int(rows["size"].sum())
    starts = bounds(len(rows), size, request.shards)
    content = hashlib.sha256(ranked.tobytes() + "\n".join(classes).encode("utf-8", "surrogateescape"))
    for column in ("size", "label"):
        content.update(np.ascontiguousarray(rows[column]).tobytes())
    shards = len(starts) - 1
    spec = Spec(
        name=request.name or (release[1] if release else folder_name(listing.root, request.split)),
        split=request.split,
        shards=shards,
        seed=request.seed,
        options={"shards": shards, "subset": request.subset, "key": key, **dataclasses.asdict(request.rules)},
        source={
            "kind": listing.kind,
            "images": len(rows),
            "bytes": size,
            "sha256": content.hexdigest(),
            "release": release[0] if release else None,
        },
        classes=classes,
    )
    return Plan(
        spec,
        root=listing.root.resolve(),
        tars=[tar.resolve() if isinstance(tar, Path) else tar for tar in listing.tars],
        gzipped=listing.gzipped,
        bounds=starts,
        refused=listing.refused,
        rows=rows,
        names=listing.names,
    )


def _labels(listing: Listing, class_list: list[str] | None) -> tuple[list[str], np.ndarray]:
    """Return class names by label, and each image's label: -1 without classes, -2 for a class not in the list."""
    if listing.labelled is not None:
        return _labels_by_file(listing, listing.labelled, class_list)
    group = listing.table["label"]
    if not listing.classes:
        return [], np.full(len(listing), -1)
    if (group < 0).any():
        outside = listing.name(int(np.flatnonzero(group < 0)[0]))
        raise SourceError(
            f"{listing.root}: {outside!r} is in no class folder, but others are; --unlabelled takes all without labels"
        )
    classes = class_list or sorted(listing.classes, key=os.fsencode)
    number = {name: label for label, name in enumerate(classes)}
    label = np.array([number.get(name, -2) for name in listing.classes])[group]
    counts = np.bincount(label[label >= 0], minlength=len(classes))
    empty = [classes[one] for one in np.flatnonzero(counts == 0)]
    empty += labels.missing_from_1k(classes) if class_list is None else []
    if empty:
        text = (
            f"{len(empty)} of {len(classes)} classes have no image: {', '.join(empty[:5])}{' ...' * (len(empty) > 5)}"
        )
        if len(classes) <= 1000:
            raise SourceError(
                f"{listing.root}: {text}; complete them, or name the classes you mean with --classes FILE"
            )
        listing.notes.append(f"warning: {text}")
    return classes, label


def _labels_by_file(
    listing: Listing, labelled: dict[str, str | int], class_list: list[str] | None
) -> tuple[list[str], np.ndarray]:
    stems = [os.path.splitext(listing.name(row).rpartition("/")[2])[0] for row in range(len(listing))]  # noqa: PTH122
    lacking = [stem for stem in stems if stem not in labelled]
    if lacking:
        raise SourceError(f"{len(lacking)} of {len(stems)} images have no label in the label file, e.g. {lacking[0]!r}")
    if spare := len(labelled) - len(stems):
        listing.notes.append(f"{spare:,} labels of the label file belong to no image here")
    numbers = [value for value in labelled.values() if isinstance(value, int)]
    if not numbers:
        classes = class_list or sorted({str(value) for value in labelled.values()})
        number = {name: label for label, name in enumerate(classes)}
        return classes, np.array([number.get(str(labelled[stem]), -2) for stem in stems])
    count = max(numbers) + 1
    if class_list is None and count > max(len(stems), _FEW_CLASSES):
        raise SourceError(
            f"label {count - 1} would mean {count:,} classes for {len(stems):,} images: correct the label file, "
            f"or name the classes with --classes FILE"
        )
    if class_list is not None and count > len(class_list):
        raise SourceError(
            f"label {count - 1} is out of range: the class list has {len(class_list)} classes (--label-offset?)"
        )
    return class_list or [str(number) for number in range(count)], np.array([labelled[stem] for stem in stems])


def folder_name(root: Place, split: str) -> str:
    """Return the source's own name, or its parent's if the name only says the split."""
    for part in (root.name.partition(".")[0], root.resolve().parent.name):
        if part and part not in (split, "train", "val", "validation", "test"):
            return re.sub("[^A-Za-z0-9_]", "_", part)
    return "images"
