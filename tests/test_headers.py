"""Image sizes from the first bytes of a file."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from mapimages import encode, map_image, smooth_image, write_tar
from PIL import Image

from pipeline import headers
from pipeline.shards import ShardSet


def _forms() -> list[tuple[str, bytes]]:
    photo = Image.fromarray(smooth_image(1, 61, 83))
    exif = Image.Exif()
    exif[0x010E] = "x" * 60000
    return [
        ("baseline", encode(photo, "JPEG")),
        ("progressive", encode(photo, "JPEG", progressive=True)),
        ("gray", encode(photo.convert("L"), "JPEG")),
        ("cmyk", encode(photo.convert("CMYK"), "JPEG")),
        ("large exif", encode(photo, "JPEG", exif=exif.tobytes())),
        ("large icc", encode(photo, "JPEG", icc_profile=os.urandom(200_000))),
        ("restarts", encode(photo, "JPEG", restart_marker_blocks=2)),
        ("png", encode(photo, "PNG")),
        ("16 bit png", encode(Image.fromarray(np.arange(61 * 83, dtype=np.uint16).reshape(61, 83)), "PNG")),
        ("webp", encode(photo, "WEBP")),
        ("lossless webp", encode(photo, "WEBP", lossless=True)),
        ("webp with alpha", encode(photo.convert("RGBA"), "WEBP", exact=True, exif=exif.tobytes())),
    ]


@pytest.mark.parametrize(("name", "data"), _forms(), ids=lambda v: v if isinstance(v, str) else "")
def test_sizes_by_header_are_pillows(tmp_path: Path, name: str, data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as opened:
        width, height = opened.size
    row = ShardSet(write_tar(tmp_path / "x.tar", [("a.jpg", data)])).table[0]
    assert (row["height"], row["width"]) == (height, width) == (61, 83)
    assert headers.check(data, 61, 83) == headers.OK
    assert headers.check(data, 61, 84) == headers.OTHER_SIZE
    assert headers.check(data[:-70], 61, 83) == headers.NO_END


def test_no_bytes_confuse_the_header_parser() -> None:
    rng = np.random.default_rng(0)
    starts = [data[:40] for _, data in _forms()] + [b"", b"\xff\xd8", b"\xff\xd8\xff", b"RIFF", b"\x89PNG\r\n\x1a\n"]
    for start in starts:
        for length in (0, 1, 5, 30, 400):
            data = start + rng.bytes(length)
            kind, height, width = headers.image_size(data)
            assert kind in (headers.MORE, headers.UNKNOWN, headers.JPEG, headers.PNG, headers.WEBP)
            assert height >= 0
            assert width >= 0
            headers.check(data, 10, 10)
    for fill in (b"\xff", b"\x00"):
        assert headers.image_size(fill * 5000)[0] == headers.UNKNOWN
    bomb = bytearray(encode(map_image(0, 8, 8), "PNG"))
    bomb[16:24] = (65535).to_bytes(4, "big") * 2
    assert headers.check(bytes(bomb), 65535, 65535) == headers.TOO_LARGE
