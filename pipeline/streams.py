"""WebDataset shards that can only be read from their start: pipes, standard input, servers without sizes or ranges.

webdataset parses the tars in its secure mode: it unpickles nothing, and opens no file and no command itself. This
module opens only what the caller names, never anything that a shard refers to.
"""

import hashlib
import logging
import os
import random
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from . import headers, specs, tables
from .samples import why_undecodable
from .shards import ReadError, ShardSet
from .specs import ShardError

if TYPE_CHECKING:
    import webdataset

_TIMEOUT = 60  # seconds without a byte from a server
_PAUSE = 10.0  # seconds between two attempts
_ALLOWED = 32  # number of bad samples allowed, or a hundredth of those read if that is more
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """An image of a stream. `number` counts the samples of the epoch in the order in which they are read."""

    number: int
    key: str
    image: NDArray[np.uint8]
    height: int
    width: int
    label: int


class Stream:
    """Tars that are read from start to end: a command (``pipe:CMD``, run by the shell), standard input (``-``), a file
    or named pipe, an ``http(s)://`` address, or a list or brace pattern of these.

    A Loader accepts a Stream in place of a ShardSet, with the limits of sequential reading:

    - Samples are shuffled in a buffer of `buffer` samples, which holds their stored bytes (about 0.1 MB each).
      Neighbours in the stream stay near each other.
    - Every rank reads the whole stream and takes its part of each batch.
    - A run resumes only at the start of an epoch.
    - Bad samples are skipped and logged; `bad` maps their numbers to the reasons.
    - A stream that breaks off is reopened for up to `patience` minutes. It resumes after the last sample that it
      yielded. Standard input cannot be reopened.
    """

    def __init__(self, spec: str | Sequence[str], buffer: int = 1000, patience: float = 0.0):
        entries = [spec] if isinstance(spec, str) else list(spec)
        self.entries = [entry for each in entries for entry in specs.expand(each)]
        if not self.entries:
            raise ShardError("an empty list of streams: name a command, a file or an address")
        if buffer < 1:
            raise ShardError(f"buffer {buffer} must be at least one sample")
        if not patience >= 0:
            raise ShardError(f"patience {patience} must not be negative: it is in minutes")
        self._patience = 60 * patience
        self.buffer, self.bad = buffer, dict[int, str]()
        self.fingerprint = hashlib.blake2b(repr(self.entries).encode(), digest_size=16).hexdigest()
        self._spent = False

    @property
    def once(self) -> bool:
        """Whether the stream can be read only once."""
        return "-" in self.entries

    def samples(self, seed: int, epoch: int, shuffle: bool) -> Iterator[Sample]:
        """Yield an epoch's samples. `shuffle` permutes the tars and shuffles the samples in the buffer.

        Raises ReadError if a stream is no tar, breaks off or its command fails. Raises ShardError for an address that
        is no stream, two files of one name in a sample, or too many bad samples.
        """
        draw = random.Random(f"{seed} {epoch}")
        entries = draw.sample(self.entries, len(self.entries)) if shuffle else self.entries
        found = self._read(entries)
        if not shuffle:
            yield from found
            return
        from webdataset import filters

        yield from filters.shuffle(self.buffer, initial=self.buffer, rng=draw)(found)

    def _read(self, entries: Sequence[str]) -> Iterator[Sample]:
        number = 0
        for entry in entries:
            if entry == "-" and self._spent:
                raise ReadError("standard input was read to its end: give the shards as files to read them once more")
            self._spent = self._spent or entry == "-"
            for content in self._contents(entry):
                sample = self._sample(number, content)
                if sample:
                    yield sample
                number += 1

    def _contents(self, entry: str) -> Iterator[dict[str, Any]]:
        """Yield each sample of a tar once, even if the stream breaks off and is reopened."""
        seen, end = 0, 0.0
        while True:
            try:
                with _opened(entry) as file:
                    for content in islice(_grouped(entry, file), seen, None):
                        yield content
                        seen, end = seen + 1, 0.0
                return
            except ReadError as error:
                if not end:
                    end = time.monotonic() + (self._patience if entry != "-" else 0)
                    if self._patience:
                        _log.warning("%s; trying again for up to %g minutes", error, self._patience / 60)
                if time.monotonic() >= end:
                    raise
            time.sleep(_PAUSE)

    def _sample(self, number: int, content: dict[str, Any]) -> Sample | None:
        data = next((content[extension] for extension in tables.IMAGES if extension in content), None)
        if data is None:
            return None
        kind, height, width = headers.image_size(data)
        if kind in (headers.UNKNOWN, headers.MORE):
            height = width = 0
        finding = headers.check(data, height, width)
        reason = why_undecodable(data) if finding == headers.NO_END else headers.REASONS.get(finding)
        if reason:
            self.reject(number, content["__key__"], reason)
            return None
        return Sample(number, content["__key__"], np.frombuffer(data, np.uint8), height, width, _label(content))

    def reject(self, number: int, key: str, reason: str) -> None:
        """Record a bad sample and log it, once. Raises ShardError if there are too many."""
        if number in self.bad:
            return
        self.bad[number] = f"{key}: {reason}"
        _log.warning("bad sample left out: %s: %s", key, reason)
        if len(self.bad) > max(_ALLOWED, number // 100):
            raise ShardError(f"{len(self.bad)} samples of the stream are bad, the last is {key}: {reason}")


def _label(content: dict[str, Any]) -> int:
    found = tables.label_in(content.get("json", b""))
    label = tables.as_int(content.get("cls", b""), -1 if found is None else found)
    return label if -(2**31) <= label < 2**31 else -1


@contextmanager
def _opened(entry: str) -> Iterator[BinaryIO]:
    """Open a stream by its name. Raises ReadError if its command fails after its tar was read to the end."""
    try:
        if entry.startswith("pipe:"):
            with subprocess.Popen(entry.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE) as command:
                assert command.stdout
                try:
                    yield command.stdout  # type: ignore[misc]
                    command.stdout.read()  # drain the bytes after the tar's end
                except GeneratorExit:  # the caller stops early
                    command.terminate()
                    raise
                except BaseException:
                    command.terminate()
                    if command.wait() > 0:  # the command itself failed, so the tar breaks off
                        raise ReadError(f"{entry!r} ended with exit code {command.returncode}") from None
                    raise
                if command.wait():
                    raise ReadError(f"{entry!r} ended with exit code {command.returncode}")
        elif entry == "-":
            yield sys.stdin.buffer
        elif specs.is_address(entry):
            if not entry.lower().startswith("http"):
                raise ShardError(f"{entry} is no stream: a ShardSet reads it, in any order")
            with urllib.request.urlopen(entry, timeout=_TIMEOUT) as answer:
                yield answer
        else:
            with Path(entry).open("rb") as file:
                yield file
    except ReadError:
        raise
    except urllib.error.HTTPError as error:
        raise ReadError(f"{entry} could not be read: the server answers {error.code}") from None
    except OSError as error:
        raise ReadError(f"{entry} could not be read: {error.strerror or error}") from None


def secure() -> Any:
    """Return webdataset in its secure mode, for this whole process, unless WDS_SECURE is set in the environment."""
    import webdataset

    if "WDS_SECURE" not in os.environ:
        webdataset.utils.enforce_security = True
    return webdataset


class _Watched:
    """Remembers how a stream begins and ends: tarfile does not notice a tar cut between two members or in a header."""

    def __init__(self, file: BinaryIO):
        self._file, self._first, self._last = file, b"", b""

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._first, self._last = (self._first + data[:512])[:512], (self._last + data)[-512:]
        return data

    def is_whole(self) -> bool:
        """Read to the end and return whether it has a tar's end mark. Compressed streams have their own end marks."""
        while self.read(1 << 20):
            pass
        return self._first[257:262] != b"ustar" or self._last.count(0) == len(self._last)


def _grouped(entry: str, file: BinaryIO) -> Iterator[dict[str, Any]]:
    tariterators, watched = secure().tariterators, _Watched(file)
    files = tariterators.tar_file_expander([{"url": entry, "stream": watched}])
    held = None  # until the next sample begins or the end mark is seen: the last one of a cut tar may be incomplete
    try:
        for content in tariterators.group_by_keys(files):
            if held is not None:
                yield held
            held = content
        if not watched.is_whole():
            raise ReadError(f"{entry} breaks off: it has no end mark, with which every tar ends")
        if held is not None:
            yield held
    except (tarfile.ReadError, EOFError):
        raise ReadError(f"{entry} is no tar, or one that is damaged or breaks off") from None
    except ValueError as error:
        raise ShardError(f"{entry}: {error.args[0]}") from None


def as_webdataset(found: ShardSet, shardshuffle: int | bool = False, **options: Any) -> "webdataset.WebDataset":
    """Implement `ShardSet.webdataset`."""
    wds = secure()
    made = wds.WebDataset([str(path) for path in found.paths], shardshuffle=shardshuffle, **options)
    stages = [_Opener(found) if isinstance(stage, wds.cache.StreamingOpen) else stage for stage in made.pipeline]
    if not any(isinstance(stage, _Opener) for stage in stages):
        raise ShardError("a ShardSet keeps remote shards itself: leave cache_dir and WDS_CACHE out")
    made.pipeline = stages
    return made


class _Opener:
    """Opens shards in place of webdataset, which opens none in secure mode."""

    def __init__(self, found: ShardSet):
        self._found = found
        self._number = {str(path): k for k, path in enumerate(found.paths)}

    def __call__(self, urls: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for each in urls:
            with self._found.open(self._number[each["url"]]) as file:
                yield {**each, "stream": file}
