"""Lists a source: one row per image, from names and headers only.

A folder of class folders, a flat folder, Kaggle's layout, a folder of class tars, a tar of class tars and a tar of
images all give the same columns, so that later steps do not depend on the kind of source.
"""

import os
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline import tar
from pipeline.remote import Object
from pipeline.shards import ReadError
from pipeline.specs import ShardError
from pipeline.tar import TarError

from . import SourceError, places
from .images import Rules
from .labels import BESIDE, beside, read_labels
from .places import Address, Place

IMAGES = {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
_SAME_SPLIT = {"val": ("val", "validation"), "validation": ("val", "validation")}
_SPLITS = ("train", "val", "validation", "test")
_AROUND = {*_SPLITS, "images"}  # a single folder of this name around a flat set is not a class
# One image: index of its tar (-1: a file below the root), its class (-1: none), offset and size in the tar, and where
# its name is in `Listing.names`.
ROW = np.dtype(
    [("tar", "<i4"), ("label", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("name_at", "<i8"), ("name_bytes", "<i4")]
)
_PACKED = struct.Struct("<iiqqqi")  # the same fields

OnProgress = Callable[[int, int], object]  # called with the number of further images and their bytes


@dataclass(frozen=True)
class Request:
    """The command line's options. The bytes of the shards depend only on these and the source."""

    source: Place
    split: str = "train"
    name: str | None = None
    labels: Path | None = None
    label_offset: int | None = None
    unlabelled: bool = False
    class_list: Path | None = None
    subset: int | None = None
    key: str = "auto"
    seed: int = 0
    shards: int | None = None
    rules: Rules = field(default_factory=Rules)


@dataclass
class Listing:
    """All images, in the order found. Each takes 36 bytes and its name: 14 million images take 0.9 GB."""

    root: Place
    kind: str  # description to print
    on_progress: OnProgress  # a listing may take hours
    tars: list[Path | Object] = field(default_factory=list)  # empty if images are files below root
    classes: dict[str, int] = field(default_factory=dict)  # name -> number, in the order found
    notes: list[str] = field(default_factory=list)
    rows: bytearray = field(default_factory=bytearray)  # concatenated ROWs; their label is an index into classes
    names: bytearray = field(default_factory=bytearray)  # concatenated paths below root or in the tar
    refused: list[tuple[str, str]] = field(default_factory=list)  # (name, reason): links, devices, unsafe names
    ignored: Counter = field(default_factory=Counter)  # what -> how many
    labelled: dict[str, str | int] | None = None  # file stem -> class name or label, instead of folders
    class_file: Path | None = None  # a list of classes that came with the source
    gzipped: bool = False

    def __len__(self) -> int:
        return len(self.rows) // ROW.itemsize

    @property
    def table(self) -> np.ndarray:
        """The rows as an array (images,) of ROW. It is a view of `rows`: no image can be added while it is held."""
        return np.frombuffer(self.rows, ROW)

    def name(self, row: int) -> str:
        *_, start, size = _PACKED.unpack_from(self.rows, row * ROW.itemsize)
        return os.fsdecode(bytes(self.names[start : start + size]))

    def place(self, row: int) -> str:
        tar = _PACKED.unpack_from(self.rows, row * ROW.itemsize)[0]
        return f"{self.tars[tar]}:{self.name(row)}" if tar >= 0 else f"{self.root}/{self.name(row)}"

    def add(self, name: str, size: int, label: int, tar: int = -1, offset: int = 0) -> None:
        encoded = os.fsencode(name)
        self.rows += _PACKED.pack(tar, label, offset, size, len(self.names), len(encoded))
        self.names += encoded
        self.on_progress(1, size)

    def class_number(self, name: str) -> int:
        return self.classes.setdefault(name, len(self.classes))

    def forget_classes(self) -> None:
        self.classes = {}
        self.table["label"] = -1


def read(request: Request, on_progress: OnProgress) -> Listing:
    """Detect the kind of source and list it. Raises SourceError with the remedy if it cannot be used."""
    source = request.source
    try:
        if not source.exists():
            listed = not str(source).startswith("http")
            remedy = "" if listed else "; a web server does not say what a folder holds: copy it to a disk or a bucket"
            raise SourceError(f"{source} does not exist: SOURCE is a folder or a tar of images{remedy}")
        source, label_file = _descend(request)
        if source.is_file():
            listing = _tar_file(source, on_progress)
        else:
            listing = _folder(source, request.unlabelled or label_file is not None, on_progress)
        name = "LOC_synset_mapping.txt"
        has_mapping = not request.unlabelled and (request.source / name).is_file()
        listing.class_file = places.nearby(request.source, [name]) / name if has_mapping else None
    except (TarError, ShardError) as error:
        raise SourceError(str(error)) from None
    except ReadError:  # an outage
        raise
    except OSError as error:
        at = Path(error.filename or str(source))
        while at != source and not os.path.lexists(at):  # a file that was only looked for, in an unreadable folder
            at = at.parent
        raise SourceError(f"cannot read {at}: {error.strerror}") from None
    if not len(listing):
        raise SourceError(f"{source} holds no image{_ignored(listing)}")
    if request.unlabelled:
        listing.forget_classes()
    elif label_file is not None:
        listing.forget_classes()
        listing.labelled = read_labels(label_file, request.label_offset)
        listing.notes.append(f"labels from {label_file}")
    elif not listing.classes and any("ILSVRC2012_val_" in listing.name(row) for row in range(min(100, len(listing)))):
        raise SourceError(
            f"{source} is ImageNet's flat validation set: give --labels the devkit (folder or .tar.gz) or "
            f"LOC_val_solution.csv, or say --unlabelled"
        )
    return listing


def _descend(request: Request) -> tuple[Place, Path | None]:
    """Return the part of a download that belongs to the split, and the label file next to it, if any."""
    top = source = request.source
    aliases = _SAME_SPLIT.get(request.split, (request.split,))
    if top.is_dir():
        official = top / f"ILSVRC2012_img_{aliases[0]}.tar"
        kaggle = top / "ILSVRC" / "Data" / "CLS-LOC"
        inner = [kaggle / name for name in aliases] + [top / name for name in aliases]
        source = official if official.is_file() else next((folder for folder in inner if folder.is_dir()), top)
        folders = set(places.entries(top)[0])
        if source == top and folders and folders <= set(_SPLITS) and not request.unlabelled:
            raise SourceError(
                f"{top} holds {', '.join(sorted(folders))}, but no {request.split}: name the folder, or its --split"
            )
    if request.labels or request.unlabelled or aliases[0] != "val":
        return source, None if request.unlabelled else request.labels
    if source.is_dir() and places.entries(source)[0]:
        return source, None
    around = top if top.is_dir() else top.parent
    if isinstance(around, Address) and not around.is_dir():  # on a web server
        return source, None
    return source, beside(places.nearby(around, BESIDE))


def _ignored(listing: Listing) -> str:
    return f" (ignored: {', '.join(f'{n} {what}' for what, n in listing.ignored.items())})" if listing.ignored else ""


def _wanted(listing: Listing, name: str) -> bool:
    """Whether a file is an image, by its extension (contents are examined later). Hidden files never are."""
    base = name.rpartition("/")[2]
    extension = os.path.splitext(base)[1].lower()  # noqa: PTH122 - called once per image, pathlib is slow
    if base.startswith("."):
        listing.ignored["hidden files"] += 1
    elif extension not in IMAGES:
        listing.ignored[f"{extension or 'extensionless'} files"] += 1
    else:
        return True
    return False


# --- folders ---------------------------------------------------------------------------------------------------------


def _folder(root: Place, any_depth: bool, on_progress: OnProgress) -> Listing:
    listing = Listing(root, "", on_progress)
    folders, files = places.entries(root)
    folders = [name for name in folders if not name.startswith(".")]
    class_tars = [name for name in files if name.endswith(".tar")]
    if class_tars and (root / "manifest.json").exists():
        raise SourceError(f"{root} holds finished shards, not images to make them of")
    if class_tars and not folders:
        listing.kind = "folder of class tars"
        for name in class_tars:
            listing.tars.append(places.file(root / name))
            with closing(places.plain(listing.tars[-1])) as class_tar:
                _tar_members(listing, class_tar, tar.Walk(class_tar, strict=True), name.removesuffix(".tar"))
        return listing

    def wanted(name: str) -> bool:
        return _wanted(listing, name)

    _add_files(listing, places.directly(root, files, wanted), -1)
    flat = len(listing)
    for name, found in places.below(root, folders, wanted):
        _add_files(listing, found, -1 if any_depth or flat else listing.class_number(name))
    if flat and len(listing) > flat and not any_depth:
        raise SourceError(
            f"{root} holds images both directly and in folders: say --unlabelled to take them all without labels, "
            f"or move {listing.name(0)!r} into a class folder"
        )
    listing.kind = "folder of class folders" if listing.classes else "folder of images"
    return listing


def _add_files(listing: Listing, found: places.Sizes, label: int) -> None:
    for name, size in found:
        if size is None:
            listing.refused.append((name, "not a regular file"))
        else:
            listing.add(name, size, label)


# --- tars ------------------------------------------------------------------------------------------------------------


def _tar_file(path: Place, on_progress: OnProgress) -> Listing:
    listing = Listing(path, "tar of images", on_progress, tars=[places.file(path)])
    with closing(places.open_bytes(listing.tars[0])) as source:
        listing.gzipped = isinstance(source, tar.GzipFile)
        _tar_members(listing, source, tar.Walk(source, strict=True), None)
        if isinstance(source, tar.GzipFile):
            source.finish()
            listing.kind += ", gzipped"
    if listing.kind.startswith("tar of images") and len(listing.classes) == 1 and set(listing.classes) <= _AROUND:
        listing.forget_classes()
    return listing


def _tar_members(
    listing: Listing, source: tar.PlainFile | tar.GzipFile | tar.Bytes, walk: tar.Walk, class_name: str | None
) -> None:
    """Add the images of a tar and of the tars in it; the class is the inner tar's name, or the folder's."""
    if class_name is not None:
        listing.class_number(class_name)  # registers a class even if it has no images
    for member in walk:
        path, end = PurePosixPath(member.name), member.offset + member.size
        if member.kind == "folder":
            continue
        if member.kind != "file":
            listing.refused.append((member.name, f"{member.kind} in a tar"))
        elif path.is_absolute() or ".." in path.parts:
            listing.refused.append((member.name, "unsafe name in a tar"))
        elif path.suffix.lower() == ".tar" and class_name is None:
            listing.kind = "tar of class tars"
            inner = tar.Walk(source, member.offset, end, strict=True, inside=member.name)
            _tar_members(listing, source, inner, path.stem)
        elif _wanted(listing, member.name):
            name = path.parent.name if class_name is None else class_name
            label = listing.class_number(name) if name else -1
            listing.add(member.name, member.size, label, len(listing.tars) - 1, member.offset)
    listing.notes += [f"{walk.where}: {note}" for note in walk.notes]
