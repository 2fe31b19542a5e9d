"""What the first and last bytes of a stored image say: its format, its size in pixels, whether its end is there.

JPEG (ITU-T T.81, annex B), PNG (ISO/IEC 15948) and WebP (RFC 9649), read without a decoder: about 1 us per image, so
that every image can be checked on its way to the decoder, which on some devices decodes a cut-off file without a word.
"""
# ruff: noqa: SIM110 - numba compiles loops, not generators

import numpy as np
from numpy.typing import NDArray

from .kernel import kernel

UNKNOWN, JPEG, PNG, WEBP = 0, 1, 2, 3
MORE = -1  # the buffer ends before the size is reached: read more
MAX_PIXELS = 1 << 27  # 134 megapixels, 400 MB decoded: beyond it a header is a decompression bomb or damage
MAX_BYTES = 3 * MAX_PIXELS  # a stored image that is larger is none, and is not read
_TAIL = 64  # an end-of-image marker may be followed by padding of this many bytes


@kernel
def _be(b, i, count):
    x = np.int64(0)
    for k in range(count):
        x = (x << 8) | np.int64(b[i + k])
    return x


@kernel
def _le(b, i, count):
    x = np.int64(0)
    for k in range(count):
        x |= np.int64(b[i + k]) << (8 * k)
    return x


@kernel
def _is(b, i, word):
    for k in range(word.size):
        if b[i + k] != word[k]:
            return False
    return True


_PNG_SIGNATURE = np.frombuffer(b"\x89PNG\r\n\x1a\n", np.uint8)
_IHDR, _IEND = np.frombuffer(b"IHDR", np.uint8), np.frombuffer(b"IEND", np.uint8)
_RIFF, _WEBP = np.frombuffer(b"RIFF", np.uint8), np.frombuffer(b"WEBP", np.uint8)
_VP8, _VP8L, _VP8X = (np.frombuffer(word, np.uint8) for word in (b"VP8 ", b"VP8L", b"VP8X"))


@kernel
def _jpeg_size(b):
    i, n = 2, b.size
    while i + 9 <= n:
        if b[i] != 0xFF:
            return np.int64(UNKNOWN), np.int64(0), np.int64(0)
        marker = b[i + 1]
        if marker == 0xFF:  # fill bytes may precede a marker
            i += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a segment
            i += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            return np.int64(JPEG), _be(b, i + 5, 2), _be(b, i + 7, 2)
        elif marker in (0xD9, 0xDA) or _be(b, i + 2, 2) < 2:  # image data before any frame
            return np.int64(UNKNOWN), np.int64(0), np.int64(0)
        else:
            i += 2 + _be(b, i + 2, 2)
    return np.int64(MORE), i + 9, np.int64(0)


@kernel
def _size(b):
    none = np.int64(UNKNOWN), np.int64(0), np.int64(0)
    n = b.size
    if n >= 3 and b[0] == 0xFF and b[1] == 0xD8 and b[2] == 0xFF:
        return _jpeg_size(b)
    if n >= 24 and _is(b, 0, _PNG_SIGNATURE) and _is(b, 12, _IHDR):
        return np.int64(PNG), _be(b, 20, 4), _be(b, 16, 4)
    if n >= 30 and _is(b, 0, _RIFF) and _is(b, 8, _WEBP):
        if _is(b, 12, _VP8):
            return np.int64(WEBP), _le(b, 28, 2) & 0x3FFF, _le(b, 26, 2) & 0x3FFF
        if _is(b, 12, _VP8L):
            bits = _le(b, 21, 4)
            return np.int64(WEBP), ((bits >> 14) & 0x3FFF) + 1, (bits & 0x3FFF) + 1
        if _is(b, 12, _VP8X):
            return np.int64(WEBP), _le(b, 27, 3) + 1, _le(b, 24, 3) + 1
    return none


@kernel
def _ends(b, kind):
    n = b.size
    if kind == JPEG:
        for i in range(n - 2, max(n - 2 - _TAIL, 1), -1):
            if b[i] == 0xFF and b[i + 1] == 0xD9:
                return True
        return False
    if kind == PNG:
        return n >= 20 and _is(b, n - 8, _IEND)
    return _le(b, 4, 4) + 8 <= n


@kernel
def _check(b, height, width):
    kind, h, w = _size(b)
    if kind <= UNKNOWN:
        return 1
    if h != height or w != width:
        return 2
    if h * w > MAX_PIXELS or h * w == 0:
        return 3
    return 0 if _ends(b, kind) else 4


SOUND, NO_IMAGE, OTHER_SIZE, TOO_LARGE, NO_END = range(5)
REASONS = {
    NO_IMAGE: "no JPEG, PNG or WebP image",
    OTHER_SIZE: "its size in pixels is not the one that the sample table gives",
    TOO_LARGE: f"no pixels, or more than {MAX_PIXELS}, by its header",
    NO_END: "cut off: no end of image",
}


def image_size(head: NDArray[np.uint8]) -> tuple[int, int, int]:
    """(format, height, width) by the first bytes of an image (n,).

    UNKNOWN where they are no image's; (MORE, bytes needed so far, 0) where the size lies further in: long EXIF or ICC
    segments may put it behind 64 KiB and more.
    """
    return _size(head)


def check(data: NDArray[np.uint8], height: int, width: int) -> int:
    """SOUND, or what is wrong with a whole stored image (n,) that should measure `height` x `width`.

    NO_END is a doubt rather than a verdict: some writers leave the end marker out or put other data behind it.
    """
    return _check(data, height, width)
