"""Verifies that one image decodes; passes it through unchanged, repairs it, or refuses it with a reason."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.headers import jpeg_frame

warnings.simplefilter("ignore")  # Pillow's warnings on odd EXIF, palettes, sizes: this module decides about these
Image.MAX_IMAGE_PIXELS = None  # our own limit is checked first, by the header

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_USUAL_SAMPLING = {((1, 1),), ((1, 1),) * 3, ((2, 1), (1, 1), (1, 1)), ((2, 2), (1, 1), (1, 1))}


class Refused(Exception):
    """Raised for an unusable image; the message is the reason in the quarantine list."""


@dataclass(frozen=True)
class Rules:
    """The command line's options for images."""

    short_side: int | None = None  # downsize larger images to this; never enlarge
    quality: int = 95  # of re-encoded images
    subsampling: str | None = None  # chroma subsampling of re-encoded images, for example 4:4:4; None: Pillow's default
    max_pixels: int = 30_000_000  # ImageNet-1k's largest has 28.5 million; a repair holds two copies at 4 bytes/pixel


@dataclass(frozen=True)
class Jpeg:
    """A JPEG to store. `repairs` is empty if `content` is the source's own bytes."""

    content: bytes
    height: int
    width: int
    repairs: tuple[str, ...]
    notes: tuple[str, ...]  # counted only, image unchanged: progressive, unusual chroma sampling
    orientation: int = 1  # EXIF orientation that was applied to the pixels; 1 is none


def examine(data: bytes, rules: Rules) -> Jpeg:
    """Decode `data` once and return the JPEG to store. Raises Refused.

    For a JPEG that is stored unchanged, every coefficient of every component is entropy-decoded. The arithmetic after
    that cannot fail, so only each block's mean is computed. This finds the same faults as a decode to full size, in two
    thirds of the time and a fraction of the memory. Some damage only gives a libjpeg warning (a wrong value within the
    data, an end mark after half an image). No decoder refuses it, and neither does this function.
    """
    image = _open(data)
    width, height = image.size
    if width * height > rules.max_pixels:
        raise Refused(f"larger than --max-pixels: {width} x {height} by its header")
    orientation, notes = _orientation(image)
    repairs = []
    if not data.startswith(b"\xff\xd8"):
        repairs.append(f"{image.format} to JPEG")
    elif (frame := jpeg_frame(data)[0]) not in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive; few read others
        if frame <= 0:
            raise Refused("no frame header in the JPEG")
        repairs.append(f"JPEG of type SOF{frame - 0xC0}")
    elif image.mode not in ("L", "RGB"):
        repairs.append(f"{image.mode} to RGB")  # CMYK and YCCK alike: Pillow calls both CMYK
    if orientation != 1:
        repairs.append("EXIF orientation")
    shrink = rules.short_side is not None and min(width, height) > rules.short_side
    if shrink:
        repairs.append("downsized")
    try:
        if not repairs:
            if image.info.get("progressive"):
                notes.append("progressive")
            if tuple((h, v) for _, h, v, _ in getattr(image, "layer", ())) not in _USUAL_SAMPLING:
                notes.append("unusual chroma sampling")
            image.draft("L", (1, 1))
            image.load()
            return Jpeg(data, height, width, (), tuple(notes))
        image.load()
        if orientation != 1:
            image = ImageOps.exif_transpose(image)
        image = _flat(image)
        if shrink and rules.short_side is not None:
            scale = rules.short_side / min(image.size)
            size = [max(1, round(side * scale)) for side in image.size]
            image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        chroma = {"subsampling": rules.subsampling} if rules.subsampling else {}
        image.save(out, "JPEG", quality=rules.quality, exif=b"", icc_profile=None, comment=b"", **chroma)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... on damaged data
        raise Refused(f"does not decode: {error}") from None
    return Jpeg(out.getvalue(), image.height, image.width, tuple(repairs), tuple(notes), orientation)


def _open(data: bytes) -> Image.Image:
    """Open an image by its first bytes, not by its name. Reads the header only; no pixel is decoded or allocated."""
    if not data:
        raise Refused("empty file")
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:  # Pillow's own message contains the address of a buffer
        raise Refused(f"no supported image, or a damaged header: begins with {data[:12]!r}") from None
    except Exception as error:
        raise Refused(f"unreadable header: {error}") from None


def _orientation(image: Image.Image) -> tuple[int, list[str]]:
    if "exif" not in image.info and "Raw profile type exif" not in image.info:
        return 1, []
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:
        return 1, ["corrupt EXIF"]
    return (orientation, []) if orientation in range(1, 9) else (1, ["corrupt EXIF"])


def _flat(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB or gray: 16 bits lose the lower 8, transparency becomes white."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray((np.clip(np.asarray(image), 0, 65535).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image)
        return white
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")
