"""Loading of good samples: bad samples are detected and replaced.

Whether a sample is bad depends only on its stored bytes and, with masks, on the class list beside its shard. Every
device, rank and resumed run therefore makes the same replacements. Each image is checked before the decoder gets it:
complete, an image, of the size in the table, and with an end marker. If only the end marker is missing, Pillow decodes
the image once to decide. Damage in the middle of the data shows only when a decoder fails, and the sample is rejected
then. Devices may differ there, but a set that was verified when it was made has no such images. Masks are decoded here.
A bad sample is not read again, so it costs time only once. Unreadable bytes (a failing file system, a missing shard) do
not make a sample bad, since that would depend on the moment.
"""

import io
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from . import headers
from .masks import decode_mask
from .order import replacement
from .parameters import VOID
from .shards import MASK, ReadError, ShardError, ShardSet

_Stored = TypeVar("_Stored", bytes, bytes | None)
_log = logging.getLogger(__name__)
_FORMATS = ("JPEG", "PNG", "WEBP")
_PAUSES = (0.1, 1.0, 5.0, 15.0)  # seconds between read attempts: network file systems may be unavailable that long
_LISTED = 20  # number of bad samples that the final error lists


class _Bad(ValueError):
    """A bad sample; the message is the reason."""


Loaded = tuple[NDArray[np.uint8], NDArray[np.uint8] | None]
"""The stored bytes of an image u8 (n,), and its mask u8 (H, W) if masks are enabled."""


class Samples:
    """The good samples of a shard set, for the draws of one seed.

    `bad` maps the number of each bad sample found so far to the reason. ShardError with a list is raised if more than
    the share `max_bad` of the set is bad; None allows a hundredth of the set, but at least 32 samples. With `masks`, a
    sample needs a label map of its image's size and of listed classes. Thread-safe.
    """

    def __init__(self, shards: ShardSet, seed: int, max_bad: float | None = None, masks: bool = False):
        if max_bad is not None and not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad is a share of the samples, in [0, 1], not {max_bad}")
        n = len(shards)
        self.shards, self.bad = shards, dict[int, str]()
        self._seed, self._masks = seed, masks
        self._classes = len(shards.listed("classes.txt")) if masks else 0  # 0: not known
        self._allowed = min(n - 1, max(32, n // 100) if max_bad is None else int(max_bad * n))
        self._decoded: set[int] = set()  # images without an end marker that Pillow has decoded in full
        self._lock = threading.Lock()

    def load(
        self, epoch: int, wanted: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
        """Load the samples `wanted`, with bad ones replaced for this epoch. Returns their numbers i64 (B,), stored
        images and masks. Raises ReadError if one cannot be read, ShardError if too many are bad.
        """
        self.shards.advise(wanted)
        found = [self._load(epoch, int(i)) for i in wanted]
        masks = [mask for _, (_, mask) in found if mask is not None]
        return np.array([i for i, _ in found], dtype=np.int64), [image for _, (image, _) in found], masks

    def _load(self, epoch: int, wanted: int) -> tuple[int, Loaded]:
        taken, attempt = wanted, 0
        while (loaded := self._good(taken)) is None:
            self._stop_if_too_many()  # other threads may have found more bad samples: perhaps no good one is left
            attempt += 1
            taken = replacement(self._seed, epoch, wanted, attempt, len(self.shards))
        return taken, loaded

    def _good(self, i: int) -> Loaded | None:
        if i in self.bad:
            return None
        try:
            return self._image(i), self._mask(i) if self._masks else None
        except _Bad as reason:
            self.reject(i, str(reason))
            return None

    def _image(self, i: int) -> NDArray[np.uint8]:
        """Return the stored bytes of an image. Raises _Bad."""
        row = self.shards.table[i]
        if row["size"] > headers.MAX_BYTES:
            raise _Bad(f"too large: more than {headers.MAX_BYTES} bytes")
        stored = self._read(i, self.shards.read)
        if len(stored) < row["size"]:
            raise _Bad(f"the shard ends after {len(stored)} of its {row['size']} bytes")
        if not stored:
            raise _Bad("no bytes")
        finding = headers.check(stored, int(row["height"]), int(row["width"]))
        if finding == headers.NO_END and i not in self._decoded:
            if reason := why_undecodable(stored):
                raise _Bad(reason)
            self._decoded.add(i)
        elif finding not in (headers.OK, headers.NO_END):
            raise _Bad(headers.REASONS[finding])
        return np.frombuffer(stored, np.uint8)

    def _mask(self, i: int) -> NDArray[np.uint8]:
        """Return the label map of an image, u8 (H, W). Raises _Bad."""
        stored = self._read(i, self.shards.read_mask)
        if stored is None:
            raise _Bad(f"no mask: its shard has no {self.shards.key(i)}.{MASK}")
        try:
            mask = decode_mask(stored)
        except ValueError as error:
            raise _Bad(str(error)) from None
        row = self.shards.table[i]
        if mask.shape != (row["height"], row["width"]):
            measured = " x ".join(map(str, mask.shape))
            raise _Bad(f"its mask measures {measured} pixels where the image has {row['height']} x {row['width']}")
        if self._classes and (unlisted := mask[(mask >= self._classes) & (mask != VOID)]).size:
            raise _Bad(f"its mask has class {unlisted.max()}, but classes.txt lists {self._classes}")
        return mask

    def _read(self, i: int, read: Callable[[int], _Stored]) -> _Stored:
        for pause in _PAUSES:
            try:
                return read(i)
            except ReadError:  # final: the message already says what was tried
                raise
            except OSError:
                time.sleep(pause)
        try:
            return read(i)
        except OSError as error:
            raise ReadError(
                f"{self.shards.shard_of(i)} cannot be read ({error.strerror or error}; {len(_PAUSES) + 1} attempts "
                f"in {sum(_PAUSES):.0f} s): make it readable, then run it again"
            ) from error

    def reject(self, i: int, reason: str) -> None:
        """Mark a sample as bad and log it, once. Raises ShardError if there are too many."""
        with self._lock:
            if i in self.bad:
                return
            self.bad[i] = reason
            _log.warning("bad sample replaced: %s", self._named(i))
        self._stop_if_too_many()

    def add_bad(self, bad: dict[int, str]) -> None:
        """Mark samples as bad that another process has logged. Raises ShardError if there are too many."""
        with self._lock:
            self.bad.update({i: reason for i, reason in bad.items() if i not in self.bad})
        self._stop_if_too_many()

    def _stop_if_too_many(self) -> None:
        if len(self.bad) <= self._allowed:
            return
        with self._lock:
            listed = "; ".join(self._named(bad) for bad in list(self.bad)[:_LISTED])
            more = f"; and {len(self.bad) - _LISTED} more" if len(self.bad) > _LISTED else ""
            raise ShardError(
                f"{len(self.bad)} of {len(self.shards)} samples are bad, but max_bad allows {self._allowed}: "
                f"repair the shards or raise max_bad. They are {listed}{more}"
            )

    def _named(self, i: int) -> str:
        try:
            key = self.shards.key(i)
        except OSError:  # the shard is gone
            key = f"number {i}"
        return f"{key} in {self.shards.shard_of(i)}: {self.bad[i]}"


def why_undecodable(image: bytes) -> str | None:
    """Return the reason why Pillow cannot decode an image, or None if it can."""
    try:
        with Image.open(io.BytesIO(image), formats=_FORMATS) as opened:
            opened.load()
    except UnidentifiedImageError:
        return "cannot be decoded: its header is damaged"
    except Exception as error:  # decoders raise many types on damaged bytes; each means a bad sample
        return f"cannot be decoded: {error}"
    return None
