"""The class of an image if its folder does not say it: class lists, the devkit, Kaggle's csv files."""

import csv
import io
import re
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from . import SourceError

_INTEGER = re.compile(r"-?\d{1,18}")  # Python refuses to read very long numbers
WNID = re.compile(r"n\d{8}")
# Number of classes -> (description, name of the shards). The names are those of timm's published shards.
RELEASES = {
    1000: ("ImageNet-1k (ILSVRC2012)", "imagenet1k"),
    10450: ("ImageNet-21k-P, winter21", "imagenet_w21p"),
    11221: ("ImageNet-21k-P, fall11", "imagenet21kp"),
    19167: ("ImageNet-21k, winter21 release", "imagenet_w21"),
    21841: ("ImageNet-21k, fall11 release", "imagenet22k"),
}
BESIDE = (
    "LOC_val_solution.csv",
    "ILSVRC2012_devkit_t12",
    "ILSVRC2012_devkit_t12.tar.gz",
    "ILSVRC2012_validation_ground_truth.txt",  # with the devkit's meta.mat
    "meta.mat",
)


def release(classes: list[str]) -> tuple[str, str] | None:
    """(description, name) of the ImageNet release with this number of classes, if all are named like synsets."""
    return RELEASES.get(len(classes)) if all(WNID.fullmatch(name) for name in classes) else None


def read_classes(path: Path) -> list[str]:
    """Read one class per line, label = line number. Text after a synset's name (LOC_synset_mapping.txt) is dropped."""
    names = []
    for line in _text(path).splitlines():
        name = line.strip()
        if WNID.match(name):
            name = name.split()[0].rstrip(",")
        if name:
            names.append(name)
    if not names:
        raise SourceError(f"{path} names no class")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SourceError(f"{path} names class {twice!r} twice")
    return names


def missing_from_1k(classes: list[str]) -> list[str]:
    """The synsets missing from an almost complete ImageNet-1k, by timm's list; empty for any other set."""
    timm = find_spec("timm")
    if not 900 <= len(classes) < 1000 or timm is None or not timm.submodule_search_locations:
        return []
    listed = Path(timm.submodule_search_locations[0], "data", "_info", "imagenet_synsets.txt")
    known = set(listed.read_text().split()) if listed.is_file() else set()
    return sorted(known - set(classes)) if set(classes) <= known else []


def beside(folder: Path) -> Path | None:
    """The file of validation labels in `folder`, by its published name, or None."""
    return next((folder / name for name in BESIDE[:-1] if (folder / name).exists()), None)


def read_labels(path: Path, offset: int | None) -> dict[str, str | int]:
    """Read labels as {file stem: class name, or label if the file has integers}.

    `path`: Kaggle's LOC_val_solution.csv; the ILSVRC2012 devkit (folder, .tar.gz, or its ground truth .txt next to
    meta.mat); or a text file with lines `<file name> <class name or label>`. `offset` is added to integers.
    """
    if not path.exists():
        raise SourceError(f"{path} does not exist: --labels wants a csv, the devkit, or lines `<file name> <label>`")
    if path.is_dir() or tarfile.is_tarfile(path) or path.name == "ILSVRC2012_validation_ground_truth.txt":
        return _devkit(path)
    labelled = list(_lines(path))
    if not labelled:
        raise SourceError(f"{path} has no lines `<file name> <class name or label>`")
    found: dict[str, str | int] = {stem: label for _, stem, label in labelled}
    if len(found) < len(labelled):
        raise SourceError(f"{path} labels a file twice")
    integers = [row for row in labelled if _INTEGER.fullmatch(row[2])]
    if not integers:
        return found
    if len(integers) < len(labelled):  # the kind of most lines is the intended one
        words = [row for row in labelled if not _INTEGER.fullmatch(row[2])]
        few, kind = (words, "integers") if len(words) < len(integers) else (integers, "class names")
        number, _, label = few[0]
        raise SourceError(f"{path}, line {number}: {label:.40} among {kind}: labels must all be of one kind")
    numbers = {stem: int(label) for _, stem, label in labelled}
    if offset is None and min(numbers.values()) == 1:
        raise SourceError(f"{path}: labels begin at 1; say --label-offset -1 (or 0 if they really mean 1)")
    if min(numbers.values()) + (offset or 0) < 0:
        raise SourceError(f"{path}: with --label-offset {offset or 0} a label is negative")
    return {stem: label + (offset or 0) for stem, label in numbers.items()}


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, file stem, label) of each line that has both. Kaggle's csv has boxes after the label."""
    text = _text(path)
    lines: Iterator[tuple[int, list[str]]] = enumerate(map(str.split, text.splitlines()), 1)
    if path.suffix == ".csv":
        reader = csv.reader(io.StringIO(text))
        lines = ((reader.line_num, [row[0], *row[1].split()[:1]]) for row in reader if len(row) > 1)
    try:
        for number, words in lines:
            if len(words) > 1 and words[0] != "ImageId":  # the csv's heading
                yield number, Path(words[0]).stem, words[-1]
    except csv.Error as error:
        raise SourceError(f"{path} is no csv file of labels: {error}") from None


def _devkit(path: Path) -> dict[str, str | int]:
    """Read the devkit's ground truth. It uses the devkit's own ids, not the sorted order; meta.mat translates them."""
    names = ("ILSVRC2012_validation_ground_truth.txt", "meta.mat")
    try:
        from scipy.io import loadmat  # only this one file needs it, and it is slow to import

        if path.is_dir() or path.name == names[0]:
            files = path.rglob("*") if path.is_dir() else path.parent.iterdir()
            contents = {file.name: file.read_bytes() for file in files if file.name in names}
        else:
            with tarfile.open(path) as tar:
                found = {Path(member.name).name: tar.extractfile(member) for member in tar if member.isfile()}
                contents = {name: file.read() for name in names if (file := found.get(name))}
        if missing := [name for name in names if name not in contents]:
            raise SourceError(
                f"{path}: {missing[0]} of the ILSVRC2012 devkit is not there; its ids mean nothing without meta.mat, "
                f"so give the devkit's folder or .tar.gz as --labels (or LOC_val_solution.csv)"
            )
        synsets = loadmat(io.BytesIO(contents["meta.mat"]), squeeze_me=True, struct_as_record=True)["synsets"]
        wnid = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
        ids = [int(line) for line in contents[names[0]].decode("ascii").split()]
        return {f"ILSVRC2012_val_{number:08d}": wnid[one] for number, one in enumerate(ids, 1)}
    except ImportError:
        raise SourceError(f"{path}: reading the devkit's meta.mat needs scipy; or give LOC_val_solution.csv") from None
    except SourceError:
        raise
    except Exception as error:  # tarfile, gzip and scipy raise many kinds on damaged files
        raise SourceError(f"{path}: not the ILSVRC2012 devkit ({type(error).__name__}: {error})") from None


def _text(path: Path) -> str:
    """Read UTF-8 with or without a byte order mark; other bytes are kept, as in file names. Any line ends."""
    try:
        return path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from None
