"""Access to objects in buckets and on web servers through obstore: listing, and reading by byte ranges.

All requests of a process run on one event loop in a separate thread. Hundreds of requests can be in flight, Ctrl-C
interrupts any wait, and none delays the exit of the process. obstore retries transient failures (resets, truncated
bodies, stalls, 408, 429, 5xx). Other failures become one sentence that names the address, never a header or a secret.
"""

import asyncio
import atexit
import io
import os
import re
import threading
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from .shards import ReadError, ShardError

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig, RetryConfig

PART = 8 << 20
"""Bytes of one request when a whole object is fetched; object stores reach their full speed at this size."""

_CLIENT: "ClientConfig" = {"timeout": timedelta(seconds=120), "read_timeout": timedelta(seconds=30)}
_RUNNING: "RetryConfig" = {"max_retries": 10, "retry_timeout": timedelta(minutes=3)}
_STARTING: "RetryConfig" = {"max_retries": 5, "retry_timeout": timedelta(seconds=20)}  # reports a mistyped address soon
_AHEAD = 3  # parts to prefetch when an object is read from its start
_REQUESTS = 64  # limit of requests in flight in this process
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE with boto3 installed, "
    "or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}
_PREFIXES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}  # prefixes of their environment variables
_HUB = "https://huggingface.co/"
T = TypeVar("T")


@dataclass(frozen=True)
class Object:
    """A file in a bucket or on a web server, as it was when its metadata was read. `str` returns its address."""

    folder: "Folder"
    name: str
    size: int
    version: str | None
    """The server's ETag, or otherwise the time of the last change; None if unknown."""

    def __str__(self) -> str:
        return f"{self.folder.url}/{self.name}"

    async def read(self, start: int, stop: int) -> bytes:
        """Read bytes `start` to `stop` (exclusive), fewer at the object's end. Raises ReadError, also if the object is
        gone, denied or changed.
        """
        stop = min(stop, self.size)
        return await self.folder.get(self, start, stop) if start < stop else b""


class Reader(io.RawIOBase):
    """Reads an object from its start and prefetches a few parts."""

    def __init__(self, wanted: Object):
        self._parts = (submit(wanted.read(k, k + PART)) for k in range(0, wanted.size, PART))
        self._coming = deque(islice(self._parts, _AHEAD))
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest and self._coming:
            self._rest = memoryview(wait(self._coming.popleft()))
            self._coming.extend(islice(self._parts, 1))
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)

    def close(self) -> None:
        for part in self._coming:
            part.cancel()
        super().close()


class Folder:
    """The objects directly below an address. `url` has no slash at its end. The constructor sends no request."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        self.scheme = parts.scheme.lower()
        if parts.query or parts.fragment or "@" in parts.netloc:
            clean = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
            raise ShardError(
                f"{clean}: an address with a password, a signature or a query is not read, since logs would show it: "
                "give credentials by the environment"
            )
        self._starting, self._running = self._store(_STARTING), self._store(_RUNNING)

    def __reduce__(self) -> tuple[type["Folder"], tuple[str]]:
        return Folder, (self.url,)

    @property
    def lists(self) -> bool:
        """Whether its contents can be listed: buckets can, web servers cannot."""
        return not self.scheme.startswith("http")

    def _store(self, retries: "RetryConfig") -> Any:
        try:
            from obstore.store import from_url
        except ImportError:
            raise ShardError(f'{self.url}: reading it needs obstore: pip install -e ".[remote]"') from None
        client: ClientConfig = {**_CLIENT}
        options: dict[str, Any] = {}
        client["allow_http"] = self.scheme == "http" or _says_yes(f"{_PREFIXES.get(self.scheme, '')}_ALLOW_HTTP")
        if self.url.startswith(_HUB) and os.environ.get("HF_TOKEN"):
            client["default_headers"] = {"Authorization": f"Bearer {os.environ['HF_TOKEN']}"}
        if self.scheme == "s3" and os.environ.get("AWS_PROFILE") and not os.environ.get("AWS_ACCESS_KEY_ID"):
            options["credential_provider"] = self._profile()
        with self._explaining():
            return from_url(self.url, client_options=client, retry_config=retries, **options)

    def _profile(self) -> Any:
        try:
            from obstore.auth.boto3 import Boto3CredentialProvider
        except ImportError:
            raise ShardError(
                f"{self.url}: AWS_PROFILE is read by boto3, which is not installed: pip install boto3, or set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from None
        try:
            return Boto3CredentialProvider()
        except Exception as error:  # an incomplete profile raises many types
            raise ShardError(
                f"{self.url}: the profile {os.environ['AWS_PROFILE']!r} gives no credentials: {error}"
            ) from None

    async def entries(self) -> tuple[list[str], dict[str, Object]]:
        """Return the names of its subfolders, and its objects by name."""
        import obstore

        with self._explaining():
            found = await obstore.list_with_delimiter_async(self._starting)
        objects = {meta["path"]: self._object(meta["path"], meta) for meta in found["objects"]}
        return [*found["common_prefixes"]], objects

    async def list(self) -> dict[str, Object]:
        """Return its objects by name."""
        return (await self.entries())[1]

    async def below(self, folder: str) -> dict[str, Object]:
        """Return all objects of a subfolder, recursively, by their paths relative to this folder."""
        import obstore

        with self._explaining(folder):
            found = [meta async for chunk in obstore.list(self._starting, folder, chunk_size=1000) for meta in chunk]
        return {meta["path"]: self._object(meta["path"], meta) for meta in found}

    async def head(self, name: str) -> Object | None:
        """Return the object of that name, or None if it does not exist."""
        import obstore

        with self._explaining(name), suppress(FileNotFoundError):
            return self._object(name, await obstore.head_async(self._starting, name))
        return None

    async def heads(self, names: Iterable[str]) -> dict[str, Object]:
        """Return the objects that exist, by name."""
        limit = asyncio.Semaphore(_REQUESTS)

        async def one(name: str) -> Object | None:
            async with limit:
                return await self.head(name)

        return {found.name: found for found in await asyncio.gather(*map(one, names)) if found}

    async def get(self, wanted: Object, start: int, stop: int) -> bytes:
        """Read a part of an object of this folder; see `Object.read`."""
        import obstore

        options: GetOptions = {"range": (start, stop)}
        etag = wanted.version
        if etag and etag.startswith('"'):  # a weak ETag never matches
            options["if_match"] = etag
        try:
            async with _limit():
                result = await obstore.get_async(self._running, wanted.name, options=options)
                body = bytes(await result.bytes_async())
        except Exception as error:
            raise _unreadable(self._explained(error, str(wanted))) from None
        if result.meta["size"] != wanted.size or wanted.version not in (None, _version(result.meta)):
            raise _unreadable(_changed(str(wanted)))
        if len(body) != stop - start:
            raise ReadError(f"{wanted} could not be read: {len(body)} bytes came instead of {stop - start}")
        return body

    async def put(self, name: str, content: "bytes | Path", *, create: bool = False) -> bool:
        """Write an object atomically. With `create`, an existing object is kept and the result is False. Raises
        ShardError and ReadError, as the other calls do.
        """
        import obstore

        with self._explaining(name), suppress(obstore.exceptions.AlreadyExistsError):
            await obstore.put_async(self._running, name, content, mode="create" if create else "overwrite")
            return True
        return False

    async def delete(self, names: Iterable[str]) -> None:
        """Delete objects. Names that do not exist are ignored."""
        import obstore

        with self._explaining(), suppress(FileNotFoundError):
            await obstore.delete_async(self._running, list(names))

    def _object(self, name: str, meta: Any) -> Object:
        return Object(self, name, meta["size"], _version(meta))

    @contextmanager
    def _explaining(self, name: str | None = None) -> Iterator[None]:
        """Replace obstore's errors about this folder, or the object `name` in it, with the result of `_explained`."""
        try:
            yield
        except Exception as error:  # obstore also raises ValueError and others outside its own base class
            raise self._explained(error, f"{self.url}/{name}" if name else self.url) from None

    def _explained(self, error: Exception, address: str) -> Exception:
        """Convert an error of obstore to our own, without its text, which may contain headers and signed addresses."""
        from obstore import exceptions

        text = str(error)
        credentials = _CREDENTIALS.get(self.scheme, f"set HF_TOKEN if it is on {_HUB}; other tokens are not read")
        found = re.search(r"status code: (\d{3})", text)
        status = int(found[1]) if found else None
        if isinstance(error, exceptions.PreconditionError) or status == 416:
            return _changed(address)
        if isinstance(error, FileNotFoundError) or status == 404:
            return ShardError(f"{address} is missing: check the address")
        denied = exceptions.PermissionDeniedError | exceptions.UnauthenticatedError
        if isinstance(error, denied) or status in (401, 403):
            return ShardError(f"{address}: access is denied: check the address, and {credentials}")
        if "169.254.169.254" in text or "metadata.google" in text or _NO_CREDENTIALS.search(text):
            return ShardError(f"{address}: no credentials are found: {credentials}")
        if "Unable to recognise URL" in text:
            return ShardError(f"{address} is no address that can be read: it names no bucket")
        if "region" in text and "redirect" in text.lower():
            return ShardError(f"{address}: the bucket is in another region: set AWS_REGION to that region")
        if isinstance(error, exceptions.NotSupportedError) or "non-partial" in text.lower():
            return ShardError(
                f"{address}: this server ignores byte ranges, so single images cannot be read from it: use another "
                'one, or copy the shards to a disk, or read them in their order as a stream ("pipe:curl ...")'
            )
        if "builder error" in text or "scheme is not allowed" in text:
            return ShardError(f"{address}: the endpoint has no https: set AWS_ALLOW_HTTP=true if you trust the network")
        if not isinstance(error, exceptions.BaseError):
            return ShardError(f"{address} is no address that can be read: {type(error).__name__}")
        low = text.lower().replace("retry_timeout", "")
        why = next((why for mark, why in _REASONS.items() if mark in low), "the request failed")
        return ReadError(f"{address} could not be read: {f'the server answers {status}' if status else why}")


_NO_CREDENTIALS = re.compile("Account must be specified|Missing (SecretAccessKey|AccessKeyId)")
_REASONS = {
    "timed out": "no answer in time",
    "timedout": "no answer in time",
    "timeout": "no answer in time",
    "dns": "its host is not known",
    "connection refused": "no server answers there",
    "connect": "no connection",
    "error sending request": "no connection",
    "body": "the answer breaks off",
    "decod": "the answer breaks off",
}


def _says_yes(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _version(meta: Any) -> str | None:
    changed = meta.get("last_modified")
    return meta.get("e_tag") or (changed.isoformat() if changed and changed.timestamp() > 0 else None)


def _changed(address: str) -> ShardError:
    return ShardError(f"{address} has changed since this run began: start again, with shards that do not change")


def _unreadable(error: Exception) -> ReadError:
    found = ReadError(str(error))
    found.passes = isinstance(error, ReadError)
    return found


_loop: asyncio.AbstractEventLoop | None = None
_process: int | None = None
_ended = False
_lock = threading.Lock()
_semaphore: asyncio.Semaphore | None = None


def _limit() -> asyncio.Semaphore:
    global _semaphore  # noqa: PLW0603 - one per process, made on the loop
    if _semaphore is None:
        _semaphore = asyncio.Semaphore(_REQUESTS)
    return _semaphore


def submit(task: Coroutine[Any, Any, T]) -> "Future[T]":
    """Start requests and return immediately. Raises RuntimeError in a process that was forked after the first request:
    obstore's threads do not exist there, and it would wait forever.
    """
    global _loop, _process
    if _process not in (None, os.getpid()):
        task.close()
        raise RuntimeError(
            "remote shards were read before this process was forked: start processes with the 'spawn' method, or fork "
            "before the first ShardSet"
        )
    with _lock:
        if _ended:
            task.close()
            raise ReadError("the program is exiting")
        if _loop is None:
            _process, _loop = os.getpid(), asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="remote", daemon=True).start()
            # `_end` must run before threads that wait for answers are joined; atexit callbacks run after that.
            getattr(threading, "_register_atexit", atexit.register)(_end, _loop)
    return asyncio.run_coroutine_threadsafe(task, _loop)


def run(task: Coroutine[Any, Any, T]) -> T:
    """Run requests, wait for them and return their result. Exceptions propagate."""
    return wait(submit(task))


def wait(future: "Future[T]") -> T:
    """Wait for a future and return its result. Its exceptions propagate. Raises ReadError if the program is exiting."""
    try:
        return future.result()
    except CancelledError:
        raise ReadError("the program is exiting") from None
    except BaseException:
        future.cancel()
        raise


def _end(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel pending requests, so that no answer arrives during interpreter shutdown."""

    async def cancel() -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    global _ended  # noqa: PLW0603 - the process ends once
    with _lock:
        _ended = _process == os.getpid()
    if _ended:
        with suppress(Exception):
            asyncio.run_coroutine_threadsafe(cancel(), loop).result(timeout=2)
