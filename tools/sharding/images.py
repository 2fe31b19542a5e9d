"""One image: prove that it decodes, pass it through untouched, repair it, or refuse it with a reason."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.headers import jpeg_frame

warnings.simplefilter("ignore")  # Pillow on odd EXIF, palettes, sizes: we decide about these ourselves
Image.MAX_IMAGE_PIXELS = None  # our own limit comes first, and by the header

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_USUAL_SAMPLING = {((1, 1),), ((1, 1),) * 3, ((2, 1), (1, 1), (1, 1)), ((2, 2), (1, 1), (1, 1))}


class Refused(Exception):
    """This image cannot be used; the message is the reason that the quarantine list gives."""


@dataclass(frozen=True)
class Rules:
    """What the command line says about images."""

    short_side: int | None = None  # downsize to it, never up
    quality: int = 95  # of what is re-encoded
    subsampling: str | None = None  # of the chroma of what is re-encoded, such as 4:4:4; None: Pillow's own
    max_pixels: int = 30_000_000  # ImageNet-1k's largest has 28.5 million; a repair holds two copies of 4 bytes a pixel


@dataclass(frozen=True)
class Jpeg:
    """A JPEG to store. `repairs` is empty where `content` is the source's own bytes."""

    content: bytes
    height: int
    width: int
    repairs: tuple[str, ...]
    notes: tuple[str, ...]  # counted, stored as it is: progressive, unusual chroma sampling
    orientation: int = 1  # of EXIF, as applied to the pixels; 1 is none


def examine(data: bytes, rules: Rules) -> Jpeg:
    """Decodes `data` once; raises Refused.

    The proof of a JPEG that is passed through entropy-decodes every coefficient of every component; of the arithmetic
    after that, which cannot fail, it does only each block's mean. It finds the faults that a decode to full size finds,
    for two thirds of the time and a fraction of the memory. What libjpeg merely warns of (a wrong value within the
    data, an end mark after half an image) no decoder refuses, and so this does not.
    """
    image = _open(data)
    width, height = image.size
    if width * height > rules.max_pixels:
        raise Refused(f"larger than --max-pixels: {width} x {height} by its header")
    orientation, notes = _orientation(image)
    repairs = []
    if not data.startswith(b"\xff\xd8"):
        repairs.append(f"{image.format} to JPEG")
    elif (frame := jpeg_frame(data)[0]) not in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive: others few read
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
    """Reads the header, by the first bytes and not by the name; no pixel is decoded and none allocated."""
    if not data:
        raise Refused("empty file")
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:  # its own text is the address of a buffer
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
    """8-bit RGB or gray: 16 bits lose the lower 8, transparency becomes white."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray((np.clip(np.asarray(image), 0, 65535).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image)
        return white
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")
