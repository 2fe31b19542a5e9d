"""Everything that is decided before the first image is read: labels, keys, order, subset, shards.

The order is that of a keyed hash of each key, so it is a function of the seed and the set of keys alone: a folder,
a tar of class tars and a .tar.gz of the same images give the same shards, on any machine.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from . import SourceError, labels
from .sources import Listing

SHARD_BYTES = 140_000_000  # what timm's 1,024 shards of ImageNet-1k average
_FEW = 100_000  # classes, which a label file may number whatever the number of images
_CLEAN = re.compile(r"[A-Za-z0-9_-]{1,80}")
_ROW = np.dtype(
    [("place", "<i4"), ("label", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("name_at", "<i8"), ("name_bytes", "<i4")]
)


@dataclass(frozen=True)
class Item:
    """One image still to be read. `place` is an index into `Plan.tars`, or -1 for the file `name` below the root."""

    key: str
    name: str
    place: int
    offset: int
    size: int
    label: int


@dataclass
class Plan:
    """What goes where. `rows` is in the order of the output."""

    name: str
    split: str
    root: str
    tars: list[str]
    gzipped: bool
    classes: list[str]
    bounds: list[int]  # shard s holds rows[bounds[s]:bounds[s + 1]]
    options: dict
    seed: int
    source: dict  # fingerprint: says whether two sources hold the same images
    refused: list[tuple[str, str]]
    request: dict  # what was asked for, and the stamp of the tar it was asked of
    rows: np.ndarray
    names: bytearray | np.memmap

    @property
    def shards(self) -> int:
        return len(self.bounds) - 1

    def shard_file(self, shard: int) -> str:
        return f"{self.name}-{self.split}-{shard:0{max(4, len(str(self.shards - 1)))}d}.tar"

    def items(self, shard: int) -> Iterator[Item]:
        for row in self.rows[self.bounds[shard] : self.bounds[shard + 1]]:
            name_at = int(row["name_at"])
            name = os.fsdecode(bytes(self.names[name_at : name_at + int(row["name_bytes"])]))
            key = clean_key(name, self.options["key"])
            yield Item(key, name, int(row["place"]), int(row["offset"]), int(row["size"]), int(row["label"]))

    def save(self, folder: Path) -> None:
        """Each file appears whole, plan.json last: where it is, the plan is whole."""
        said = {name: value for name, value in vars(self).items() if name not in ("rows", "names")}
        half = folder / f"half.plan.{os.getpid()}"
        for name, write in (
            ("rows.npy", lambda file: np.save(file, self.rows)),
            ("names.bin", lambda file: file.write(self.names)),
            ("plan.json", lambda file: file.write(json.dumps(said).encode())),
        ):
            with half.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            half.replace(folder / name)

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        """Maps the columns: a worker pays for the rows it reads."""
        names = np.memmap(folder / "names.bin", np.uint8, "r")
        said = json.loads((folder / "plan.json").read_text())
        return cls(**said, rows=np.load(folder / "rows.npy", mmap_mode="r"), names=names)


def request_of(source: Path, **options: object) -> dict:
    """What a plan depends on, where that can be told without listing the source: None in "stamp" says it cannot."""
    files = [source, *(option for option in options.values() if isinstance(option, Path))]
    stamps = [[file.stat().st_size, file.stat().st_mtime_ns] if file.is_file() else None for file in files]
    said = {name: str(option) if isinstance(option, Path) else option for name, option in options.items()}
    return {"source": str(source.resolve()), **said, "stamp": None if None in stamps else stamps}


def known(out: Path, split: str, request: dict) -> Plan | None:
    """The plan of an unfinished run of just this request: a tar need not be walked, nor a .tar.gz unpacked, again."""
    for path in out.glob(f".*-{split}.work/plan.json") if request["stamp"] else ():
        try:
            if json.loads(path.read_text())["request"] == request:
                return Plan.load(path.parent)
        except (ValueError, KeyError, TypeError, OSError):
            continue  # damaged: made anew
    return None


def clean_key(name: str, style: str) -> str:
    """The sample's key: the file's stem, or its path where stems repeat.

    A WebDataset key is ASCII, has no dots or blanks and fits a USTAR name; where that changes the name, eight digits of
    its hash are put behind it, so that two names stay two keys.
    """
    if style == "stem":
        text = os.path.splitext(name.rpartition("/")[2])[0]  # noqa: PTH122 - called once per image, pathlib is slow
    else:
        text = str(PurePosixPath(name).with_suffix("")).replace("/", "_")
    if _CLEAN.fullmatch(text):
        return text
    digest = hashlib.blake2b(os.fsencode(text), digest_size=4).hexdigest()
    return f"{re.sub('[^A-Za-z0-9_-]', '_', text)[:80]}-{digest}"


def build(
    listing: Listing,
    *,
    name: str | None,
    split: str,
    seed: int,
    class_list: Path | None,
    image_rules: dict,
    request: dict,
    shards: int | None,
    subset: int | None,
    key_style: str,
) -> Plan:
    """Raises SourceError for what cannot be a set: duplicate keys, labels out of range, empty classes."""
    class_list = class_list or listing.class_file
    classes, label = _labels(listing, labels.read_classes(class_list) if class_list else None)
    for one in classes:
        if one.splitlines() != [one]:
            raise SourceError(f"{listing.root}: class name {one!r} is no single line, as synsets.txt has it: rename it")
    kept = np.flatnonzero(label > -2)
    if not len(kept):
        raise SourceError(f"{listing.root}: no image belongs to a class of {class_list}")
    if dropped := len(listing) - len(kept):
        listing.notes.append(f"{dropped:,} images of classes that are not in the class list are left out")

    key_bytes = seed.to_bytes(8, "little", signed=True)
    digests = bytearray()
    for row in kept:
        key = clean_key(listing.name(int(row)), key_style).encode()
        digests += hashlib.blake2b(key, digest_size=16, key=key_bytes).digest()
    digest = np.frombuffer(digests, "<u8").reshape(-1, 2)
    order = np.lexsort((digest[:, 1], digest[:, 0]))
    ranked = digest[order]
    same = np.flatnonzero((ranked[1:] == ranked[:-1]).all(axis=1))
    if len(same):
        one, other = (_place(listing, int(kept[order[same[0] + step]])) for step in (0, 1))
        first = clean_key(listing.name(int(kept[order[same[0]]])), key_style)
        remedy = "; --key path tells them apart" if key_style == "stem" else ""
        raise SourceError(f"{len(same):,} duplicate key(s): {first!r} is {one} and {other}{remedy}")
    if subset is not None:
        if subset > len(order):
            raise SourceError(f"--subset {subset}: the source has only {len(order)} images")
        order, ranked = order[:subset], ranked[:subset]

    chosen = kept[order]
    ends = np.frombuffer(listing.name_end, np.int64)
    rows = np.empty(len(chosen), _ROW)
    rows["name_at"] = np.where(chosen > 0, ends[chosen - 1], 0)
    rows["name_bytes"] = ends[chosen] - rows["name_at"]
    rows["place"] = np.frombuffer(listing.place, np.int32)[chosen]
    rows["offset"] = np.frombuffer(listing.offset, np.int64)[chosen]
    rows["size"] = np.frombuffer(listing.size, np.int64)[chosen]
    rows["label"] = label[chosen]
    size = int(rows["size"].sum())
    if shards is None:  # small sets get up to 16 shards of 100 images or more, so that workers can share them
        shards = max(math.ceil(size / SHARD_BYTES), min(16, math.ceil(len(rows) / 100)))
    elif shards > len(rows):
        raise SourceError(f"--shards {shards}: there are only {len(rows)} images")
    content = hashlib.sha256(ranked.tobytes() + "\n".join(classes).encode("utf-8", "surrogateescape"))
    for column in ("size", "label"):
        content.update(np.ascontiguousarray(rows[column]).tobytes())
    known = labels.release(classes)
    return Plan(
        name=name or (known[1] if known else _folder_name(listing.root, split)),
        split=split,
        root=str(listing.root.resolve()),
        tars=[str(Path(tar).resolve()) for tar in listing.tars],
        gzipped=listing.gzipped,
        classes=classes,
        bounds=[len(rows) * shard // shards for shard in range(shards + 1)],
        options={"shards": shards, "subset": subset, "key": key_style, **image_rules},
        seed=seed,
        source={
            "kind": listing.kind,
            "images": len(rows),
            "bytes": size,
            "sha256": content.hexdigest(),
            "release": known[0] if known else None,
        },
        refused=listing.refused,
        request=request,
        rows=rows,
        names=listing.names,
    )


def _labels(listing: Listing, class_list: list[str] | None) -> tuple[list[str], np.ndarray]:
    """Class names by label, and each image's label: -1 without classes, -2 for a class that the list leaves out."""
    if listing.labelled is not None:
        return _labels_by_file(listing, class_list)
    group = np.frombuffer(listing.group, np.int32)
    if not listing.classes:
        return [], np.full(len(listing), -1)
    if (group < 0).any():
        outside = listing.name(int(np.flatnonzero(group < 0)[0]))
        raise SourceError(
            f"{listing.root}: {outside!r} lies in no class folder though others do; --unlabelled takes all"
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


def _labels_by_file(listing: Listing, class_list: list[str] | None) -> tuple[list[str], np.ndarray]:
    labelled = listing.labelled or {}
    stems = [os.path.splitext(listing.name(row).rpartition("/")[2])[0] for row in range(len(listing))]  # noqa: PTH122
    lacking = [stem for stem in stems if stem not in labelled]
    if lacking:
        raise SourceError(f"{len(lacking)} of {len(stems)} images have no label in the label file, e.g. {lacking[0]!r}")
    if spare := len(labelled) - len(stems):
        listing.notes.append(f"{spare:,} labels of the label file belong to no image here")
    values = set(labelled.values())
    if all(isinstance(value, int) for value in values):
        top = max(value for value in values if isinstance(value, int))
        if class_list is None and top >= max(len(stems), _FEW):
            raise SourceError(
                f"label {top} would mean {top + 1:,} classes for {len(stems):,} images: correct the label file, "
                f"or name the classes with --classes FILE"
            )
        classes = class_list or [str(number) for number in range(top + 1)]
        if top >= len(classes):
            raise SourceError(
                f"label {top} is out of range: the class list has {len(classes)} classes (--label-offset?)"
            )
        return classes, np.array([labelled[stem] for stem in stems])
    classes = class_list or sorted({str(value) for value in values})
    number = {name: label for label, name in enumerate(classes)}
    return classes, np.array([number.get(str(labelled[stem]), -2) for stem in stems])


def _place(listing: Listing, row: int) -> str:
    place = listing.place[row]
    return repr(f"{listing.tars[place]}:{listing.name(row)}" if place >= 0 else f"{listing.root}/{listing.name(row)}")


def _folder_name(root: Path, split: str) -> str:
    """The source's own name; where that only says the split, its parent's."""
    for part in (root.name.partition(".")[0], root.resolve().parent.name):
        if part and part not in (split, "train", "val", "validation", "test"):
            return re.sub("[^A-Za-z0-9_]", "_", part)
    return "images"
