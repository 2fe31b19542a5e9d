"""Miniature sources for the sharder's tests in the layout of the real ones, and a function that runs the tool."""

import io
import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "shard_imagenet.py"
sys.path.insert(0, str(TOOL.parent))
WNIDS = ("n01440764", "n01443537", "n02105855")


def pixels(seed: int, height: int = 40, width: int = 56) -> np.ndarray:
    """A smooth picture that no other seed gives, u8 (height, width, 3)."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encode(seed: int, kind: str = "JPEG", *, mode: str = "RGB", size: tuple[int, int] = (40, 56), **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(seed, *size)).convert(mode).save(out, kind, **options)
    return out.getvalue()


def photographs(per_class: int = 8, wnids: tuple[str, ...] = WNIDS) -> dict[str, bytes]:
    """{`<wnid>/<wnid>_<number>.JPEG`: content}, of various sizes."""
    names = [(wnid, number) for wnid in wnids for number in range(per_class)]
    return {
        f"{wnid}/{wnid}_{number}.JPEG": encode(place, size=(30 + place % 17, 40 + place % 23))
        for place, (wnid, number) in enumerate(names)
    }


def tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def file(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def tar_of(files: dict[str, bytes], form: int = tarfile.GNU_FORMAT, mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=form) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def class_tars(files: dict[str, bytes]) -> dict[str, bytes]:
    """{`<wnid>.tar`: a tar of its images}, as ILSVRC2012_img_train.tar and fall11 hold them."""
    by_class: dict[str, dict[str, bytes]] = {}
    for name, content in files.items():
        wnid, _, base = name.partition("/")
        by_class.setdefault(wnid, {})[base] = content
    return {f"{wnid}.tar": tar_of(members) for wnid, members in by_class.items()}


def run(*arguments: object) -> int:
    """The command in this process: no start-up, one worker unless said."""
    words = [str(argument) for argument in arguments]
    if "--workers" not in words:
        words += ["--workers", "1"]
    return runpy.run_path(str(TOOL))["main"](words)


def command(*arguments: object, **options) -> subprocess.Popen:
    """The command in a process of its own, without the launcher's variables unless `env` gives some."""
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    env |= options.pop("env", {})
    words = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.Popen(
        words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones as well."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shards(folder: Path) -> dict[str, bytes]:
    """What must not depend on the form of the source: all but the manifest, which tells the form."""
    return {name: content for name, content in contents(folder).items() if "manifest" not in name}


def samples(folder: Path, pattern: str = "*.tar") -> dict[str, dict[str, bytes]]:
    """{key: {extension: content}} by Python's own tar reader; a key that appears twice fails."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob(pattern)):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                assert extension not in found.setdefault(key, {}), member.name
                found[key][extension] = tar.extractfile(member).read()
    return found
