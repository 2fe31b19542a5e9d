"""Shards for a run that names none, made from the photographs that come with scikit-image.

A seeded generator cuts 800 crops out of ten photographs; each crop shows nearly the whole photograph. That is enough
to see the pipeline work and the loss fall, but not to learn useful features.
"""

import fcntl
import random
import subprocess
import sys
from pathlib import Path

from pipeline import host
from trainer.config import UsageError

PHOTOGRAPHS = (
    "astronaut.png camera.png chelsea.png coffee.png coins.png hubble_deep_field.jpg moon.png motorcycle_left.png "
    "retina.jpg rocket.jpg"
).split()
CROPS = 80  # per photograph
SHARDER = Path(__file__).resolve().parents[1] / "tools" / "shard_imagenet.py"


def shards() -> str:
    """Return the folder with the default run's shards. The first call makes them with the sharder (ten seconds)."""
    try:
        home = host.cache_folder("photographs")
        made = home / "shards"
        if not (made / "manifest.json").exists():
            home.mkdir(parents=True, exist_ok=True)
            with (home / "lock").open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # wait if another process is making them
                if not (made / "manifest.json").exists():
                    _make(home / "pictures", made)
    except OSError as error:
        raise UsageError(f"{error}: set XDG_CACHE_HOME to a folder that can be written, or name --shards") from None
    return str(made)


def _make(pictures: Path, made: Path) -> None:
    _cut(pictures)
    # --part 0/1: all of it; the sharder would otherwise take only the part of this rank
    options = ["--split", "train", "--workers", "2", "--part", "0/1"]
    done = subprocess.run([sys.executable, str(SHARDER), str(pictures), str(made), *options], check=False)
    if done.returncode:
        raise UsageError(
            f"the bundled photographs could not be sharded (exit code {done.returncode}; see above): "
            f"remove {made.parent} and run it again, or name --shards"
        )


def _cut(folder: Path) -> None:
    """Write the pictures as an ImageFolder tree: one class per photograph, short sides of 160 to 320 pixels."""
    import skimage
    from PIL import Image

    draw = random.Random(0)
    for name in PHOTOGRAPHS:
        photograph = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        width, height = photograph.size
        target = folder / Path(name).stem
        target.mkdir(parents=True, exist_ok=True)
        for i in range(CROPS):
            share = draw.uniform(0.85, 1.0)
            w, h = share * width, share * height
            x, y = draw.uniform(0, width - w), draw.uniform(0, height - h)
            scale = draw.uniform(160, 320) / min(w, h)
            size = (round(w * scale), round(h * scale))
            picture = photograph.resize(size, Image.Resampling.LANCZOS, box=(x, y, x + w, y + h))
            picture.save(target / f"{Path(name).stem}_{i:03d}.JPEG", quality=95, subsampling=0)
