"""Header checks of stored images: format, size in pixels, and whether the end is there, from the first and last bytes.

JPEG (ITU-T T.81, annex B), PNG (ISO/IEC 15948) and WebP (RFC 9649) are parsed without a decoder. This takes some 2 us
per image, so every image can be checked before the decoder, which on some devices decodes a cut-off file silently.
"""

UNKNOWN, JPEG, PNG, WEBP = 0, 1, 2, 3
MORE = -1  # the buffer ends before the size field: read more
MAX_PIXELS = 1 << 27  # 134 megapixels, 400 MB decoded: a larger size means a decompression bomb or damage
MAX_BYTES = 3 * MAX_PIXELS  # a larger file cannot be an image and is not read
_TAIL = 64  # bytes at the end of a JPEG to search for its end marker, since padding may follow it

OK, NO_IMAGE, OTHER_SIZE, TOO_LARGE, NO_END = range(5)
REASONS = {
    NO_IMAGE: "no JPEG, PNG or WebP image",
    OTHER_SIZE: "its size in pixels is not the one that the sample table gives",
    TOO_LARGE: f"no pixels, or more than {MAX_PIXELS}, by its header",
    NO_END: "cut off: no end of image",
}


def jpeg_frame(head: bytes) -> tuple[int, int, int]:
    """Return (marker, height, width) of a JPEG's start of frame: 0xC0 baseline, 0xC2 progressive, ...

    Returns (UNKNOWN, 0, 0) if there is none, and (MORE, bytes needed so far, 0) if it is not in `head`. Bytes between
    two segments are skipped, as in libjpeg.
    """
    i, n = 2, len(head)
    while True:
        i = head.find(b"\xff", i)
        if i < 0 or i + 9 > n:
            return MORE, max(i, n) + 9, 0
        marker = head[i + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker, head[i + 5] << 8 | head[i + 6], head[i + 7] << 8 | head[i + 8]
        if marker == 0xFF:  # fill bytes may precede a marker
            i += 1
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a segment
            i += 2
        elif marker in (0xD9, 0xDA):  # image data before any frame
            return UNKNOWN, 0, 0
        else:
            i += 2 + (head[i + 2] << 8 | head[i + 3])


def image_size(head: bytes) -> tuple[int, int, int]:
    """Return (format, height, width) from the first bytes of an image.

    Returns UNKNOWN if they are not an image, and (MORE, bytes needed so far, 0) if the size is not in `head`: it may
    follow EXIF or ICC segments of 64 KiB and more.
    """
    if head.startswith(b"\xff\xd8\xff"):
        marker, height, width = jpeg_frame(head)
        return (JPEG if marker > 0 else marker), height, width
    if len(head) >= 24 and head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR":
        return PNG, int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big")
    if len(head) >= 30 and head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        kind = head[12:16]
        if kind == b"VP8 ":
            return WEBP, _little(head[28:30]) & 0x3FFF, _little(head[26:28]) & 0x3FFF
        if kind == b"VP8L":
            bits = _little(head[21:25])
            return WEBP, (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
        if kind == b"VP8X":
            return WEBP, _little(head[27:30]) + 1, _little(head[24:27]) + 1
    return UNKNOWN, 0, 0


def check(image: bytes, height: int, width: int) -> int:
    """Return OK, or the fault of a complete stored image that should have `height` x `width` pixels.

    NO_END is not conclusive: some writers omit the end marker or append other data after it.
    """
    kind, h, w = image_size(image)
    if kind <= UNKNOWN:
        return NO_IMAGE
    if (h, w) != (height, width):
        return OTHER_SIZE
    if not 0 < h * w <= MAX_PIXELS:
        return TOO_LARGE
    return OK if _ends(image, kind) else NO_END


def _ends(image: bytes, kind: int) -> bool:
    if kind == JPEG:
        return image.rfind(b"\xff\xd9", max(2, len(image) - _TAIL)) > 0
    if kind == PNG:
        return image[-8:-4] == b"IEND"
    return _little(image[4:8]) + 8 <= len(image)


def _little(field: bytes) -> int:
    return int.from_bytes(field, "little")
