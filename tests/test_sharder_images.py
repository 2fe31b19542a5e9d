"""Images that the sharder copies unchanged, images that it repairs and how, and images that it refuses and why."""

import io
import resource
import struct
import zlib

import numpy as np
import pytest
import sharder_sources as make
from PIL import Image, ImageOps
from sharding.images import Refused, Rules, examine

RULES = Rules()


def decoded(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image).astype(int)


def near(found, wanted, mean=4.0):
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).mean() < mean, np.abs(found - wanted).mean()


def saved(array, kind, **options):
    out = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        ({}, ()),
        ({"subsampling": "4:4:4"}, ()),
        ({"subsampling": "4:2:2"}, ()),
        ({"mode": "L"}, ()),
        ({"progressive": True}, ("progressive",)),
        ({"mode": "L", "progressive": True}, ("progressive",)),
        ({"optimize": True, "quality": 30}, ()),
        ({"size": (1, 1)}, ()),
        ({"size": (4, 200)}, ()),
        ({"exif": b"Exif\0\0II*\0\x08\0\0\0\xff\xffbroken"}, ("corrupt EXIF",)),
        ({"exif": b"Exif\0\0nonsense"}, ("corrupt EXIF",)),
    ],
)
def test_a_sound_jpeg_passes_byte_for_byte(options, notes):
    content = make.encode(1, **options)
    found = examine(content, RULES)
    assert found.content is content
    assert (found.height, found.width) == options.get("size", (40, 56))
    assert found.repairs == ()
    assert set(found.notes) <= set(notes)
    assert "corrupt EXIF" in notes or found.notes == notes


def test_odd_chroma_sampling_passes_and_is_counted():
    content = make.encode(1, size=(64, 64), subsampling="4:2:2")
    frame = content.index(b"\xff\xc0")
    assert content[frame + 11] == 0x21
    odd = content[: frame + 11] + b"\x12" + content[frame + 12 :]  # 4:4:0: the same blocks in another arrangement
    assert Image.open(io.BytesIO(odd)).layer[0][1:3] == (1, 2)
    found = examine(odd, RULES)
    assert found.content is odd
    assert found.notes == ("unusual chroma sampling",)


def png16():
    wide = make.pixels(2)[..., 0].astype(np.uint16) * 256 + make.pixels(3)[..., 0]  # the lower byte is another picture
    return saved(Image.fromarray(wide), "PNG"), np.asarray(make.pixels(2)[..., 0]).astype(int)


def rgb():
    return make.pixels(2).astype(int)


def with_alpha():
    return np.concatenate([make.pixels(2), np.full((40, 56, 1), 128, np.uint8)], axis=2)


REPAIRS = {
    "PNG": lambda: (make.encode(2, "PNG"), rgb(), "PNG to JPEG"),
    "gray PNG": lambda: (make.encode(2, "PNG", mode="L"), decoded(make.encode(2, "PNG", mode="L")), "PNG to JPEG"),
    "16-bit PNG": lambda: (*png16(), "PNG to JPEG"),
    "bilevel PNG": lambda: (saved(Image.new("1", (56, 40), 1), "PNG"), np.full((40, 56), 255), "PNG to JPEG"),
    "palette PNG": lambda: (
        saved(Image.fromarray(make.pixels(2)).quantize(256), "PNG"),
        np.asarray(Image.fromarray(make.pixels(2)).quantize(256).convert("RGB")).astype(int),
        "PNG to JPEG",
    ),
    "half transparent PNG, on white": lambda: (saved(with_alpha(), "PNG"), (rgb() + 255) // 2, "PNG to JPEG"),
    "lossless WebP": lambda: (make.encode(2, "WEBP", lossless=True), rgb(), "WEBP to JPEG"),
    "BMP": lambda: (make.encode(2, "BMP"), rgb(), "BMP to JPEG"),
    "GIF": lambda: (
        saved(Image.fromarray(make.pixels(2)).quantize(256), "GIF"),
        np.asarray(Image.fromarray(make.pixels(2)).quantize(256).convert("RGB")).astype(int),
        "GIF to JPEG",
    ),
    "animated GIF": lambda: (
        saved(Image.new("L", (56, 40), 200), "GIF", save_all=True, append_images=[Image.new("L", (56, 40), 0)]),
        np.full((40, 56, 3), 200),
        "GIF to JPEG",
    ),
    "CMYK": lambda: (make.encode(2, mode="CMYK", quality=95), rgb(), "CMYK to RGB"),
}


@pytest.mark.parametrize("what", REPAIRS)
def test_what_is_no_plain_jpeg_is_repaired(what):
    content, wanted, repair = REPAIRS[what]()
    found = examine(content, RULES)
    assert found.repairs == (repair,)
    with Image.open(io.BytesIO(found.content)) as image:
        assert image.format == "JPEG"
        assert image.mode == ("RGB" if wanted.ndim == 3 else "L") or what == "animated GIF"
        hard_edges = what in ("palette PNG", "GIF")  # 256 colours: chroma at half the size smears them
        near(np.asarray(image.convert("RGB" if wanted.ndim == 3 else "L")).astype(int), wanted, 8 if hard_edges else 4)
    assert (found.height, found.width) == wanted.shape[:2]
    assert examine(found.content, RULES).repairs == (), "what was repaired is valid"


@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_baked_in(turn, kind):
    upright = make.pixels(3, 32, 48)
    stored = {  # what lies in the file so that the viewer's turn makes it upright
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    found = examine(saved(np.ascontiguousarray(stored), kind, exif=exif, **options), RULES)
    assert "EXIF orientation" in found.repairs
    assert (found.height, found.width) == (32, 48)
    near(decoded(found.content), upright.astype(int))
    with Image.open(io.BytesIO(found.content)) as image:
        assert image.getexif().get(0x0112, 1) == 1
        assert ImageOps.exif_transpose(image).size == image.size


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404 Not Found</html>", "no supported image"),
        (b"\0" * 4096, "no supported image"),
        (b"\xff\xd8\xff", "header"),
        (b"\xff\xd8\xff\xe0" + b"\xff" * 4000, "header"),
        (b"\x89PNG\r\n\x1a\n" + b"junk" * 99, "header"),
        (b"GIF89a", "header"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "header"),
        (b"II*\0" + bytes(100), "no supported image"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(content, reason):
    with pytest.raises(Refused, match=reason) as refusal:
        examine(content, RULES)
    assert " at 0x" not in str(refusal.value), "an object's address: the list would differ from run to run"


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}, {"kind": "PNG"}, {"kind": "WEBP"}]
)
def test_a_cut_image_is_refused_wherever_it_is_cut(options):
    content = make.encode(4, size=(120, 160), **options)
    for size in [*range(0, len(content) - 200, 251), *range(len(content) - 40, len(content))]:
        if options.get("kind") == "PNG" and size >= len(content) - 22:
            continue  # only the end chunk (12 bytes) and two checksums are cut: the pixels are all there
        with pytest.raises(Refused):
            examine(content[:size], RULES)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"mode": "L"}, {"subsampling": "4:4:4"}])
def test_the_quick_proof_finds_what_a_full_decode_finds(options):
    content = make.encode(5, size=(96, 128), quality=92, **options)
    random = np.random.default_rng(0)
    bad = 0
    for _ in range(250):
        broken = bytearray(content)
        for at in random.integers(2, len(content), random.integers(1, 4)):
            broken[at] = random.integers(256)
        if random.random() < 0.3:
            del broken[random.integers(len(content) // 2, len(content)) :]
        try:
            with Image.open(io.BytesIO(bytes(broken)), formats=("JPEG",)) as image:
                image.load()
            whole = True
        except Exception:
            whole = False
        bad += not whole
        try:
            examine(bytes(broken), RULES)
            passed = True
        except Refused:
            passed = False
        assert passed <= whole, "passed though a full decode fails"
    assert 40 < bad < 220


def jpeg_header(height, width):
    frame = struct.pack(">2sHBHHB", b"\xff\xc0", 17, 8, height, width, 3) + b"\1\x11\0\2\x11\0\3\x11\0"
    return b"\xff\xd8" + frame + b"\xff\xda\0\x0c\3\1\0\2\0\3\0\0\x3f\0" + bytes(64) + b"\xff\xd9"


def png_header(height, width):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


BOMBS = {
    "JPEG": jpeg_header(65535, 65535),
    "PNG": png_header(65535, 65535),
    "GIF": b"GIF89a\xff\xff\xff\xff\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\xff\xff\xff\xff\0\2\2\x44\1\0;",
    "BMP": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 65535, 65535, 1, 24, 0, 9, 0, 0, 0, 0) + bytes(9),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_header_bomb_costs_no_memory(kind):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Refused, match="65535 x 65535"):
        examine(BOMBS[kind], RULES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_the_pixel_limit_is_exact():
    content = make.encode(1)
    assert examine(content, Rules(max_pixels=40 * 56)).content is content
    with pytest.raises(Refused, match="40"):
        examine(content, Rules(max_pixels=40 * 56 - 1))


@pytest.mark.parametrize(
    ("size", "side", "wanted"), [((90, 160), 45, (45, 80)), ((160, 90), 45, (80, 45)), ((3, 400), 2, (2, 267))]
)
def test_short_side_downsizes(size, side, wanted):
    found = examine(make.encode(1, size=size), Rules(short_side=side))
    assert (found.height, found.width) == wanted == decoded(found.content).shape[:2]
    assert found.repairs == ("downsized",)


def test_short_side_never_upsizes():
    content = make.encode(1, size=(40, 56))
    for side in (40, 41, 500):
        assert examine(content, Rules(short_side=side)).content is content


def test_downsizing_is_antialiased():
    stripes = np.zeros((160, 160, 3), np.uint8)
    stripes[:, ::2] = 255
    found = decoded(examine(saved(stripes, "JPEG", quality=100, subsampling=0), Rules(short_side=20)).content)
    assert np.abs(found[2:-2, 2:-2] - 127).max() < 12, "single columns would be black or white"


def test_quality_is_that_of_what_is_encoded():
    content = make.encode(6, "PNG", size=(200, 200))
    sizes = [len(examine(content, Rules(quality=quality)).content) for quality in (30, 75, 95)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2
