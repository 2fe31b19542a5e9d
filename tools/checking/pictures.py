"""Shards of generated pictures, for a machine without shards."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def make_shards(folder: Path, count: int) -> str:
    """Write `count` smooth random pictures, mostly 500x375, about 107 kB each, in tars of 500. Return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    originals = []
    for _ in range(64):  # crops make the pictures differ; generating each from scratch would take minutes
        octaves = [
            np.asarray(
                Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).resize(
                    (700, 600), Image.Resampling.BICUBIC
                ),
                dtype=np.float32,
            )
            for h, w in ((3, 4), (12, 14), (48, 56), (150, 175), (600, 700))
        ]
        weights = np.array([0.5, 0.25, 0.15, 0.1, 0.08], dtype=np.float32)
        originals.append(
            np.clip(np.tensordot(weights / weights.sum(), np.stack(octaves), 1) * 1.6 - 76, 0, 255).astype(np.uint8)
        )
    for first in range(0, count, 500):
        with tarfile.open(folder / f"check-train-{first // 500:04d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(first, min(first + 500, count)):
                h, w = ((375, 500), (500, 375), (333, 500), (480, 640))[i % 4]
                y, x = rng.integers(0, 600 - h + 1), rng.integers(0, 700 - w + 1)
                buffer = io.BytesIO()
                Image.fromarray(originals[i % 64][y : y + h, x : x + w]).save(buffer, "JPEG", quality=92)
                for suffix, data in (("jpg", buffer.getvalue()), ("cls", str(i % 10).encode())):
                    member = tarfile.TarInfo(f"picture_{i:06d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(folder)
