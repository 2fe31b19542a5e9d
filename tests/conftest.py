"""Shared fixtures: one thread for torch (tiny models gain nothing from a second, and DALI uses it), runs, a bucket."""

import io
import runpy
import signal
import sys
import tarfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import skimage
import torch
from mapimages import write_set
from PIL import Image
from remote_sets import IMAGES, QUICK, SHARDS
from runs import ROOT, TINY
from servers import Bucket, Proxy, publish, s3

from pipeline import remote, shard_cache
from trainer import interrupt

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="record the seeded losses again: results changed")


@pytest.fixture(autouse=True)
def open_webdataset() -> Iterator[None]:
    """A stream puts webdataset into its secure mode for the whole process; other tests read files through it."""
    yield
    if utils := sys.modules.get("webdataset.utils"):
        utils.enforce_security = False  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 crops of a photograph in one foreign tar: two steps of 8 make an epoch."""
    folder = tmp_path_factory.mktemp("cat_shards")
    photograph = Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png")
    with tarfile.open(folder / "cat.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(20):
            data = io.BytesIO()
            photograph.crop((10 * i, 5 * i, 10 * i + 200, 5 * i + 150)).save(data, "JPEG")
            member = tarfile.TarInfo(f"cat_{i:02d}.jpg")
            member.size = data.tell()
            tar.addfile(member, io.BytesIO(data.getvalue()))
    return folder


@pytest.fixture
def run(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """run.py's main in this process, on the tiny settings; its exit code."""
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # run.py replaces the first entry
    main = runpy.run_path(str(ROOT / "trainer" / "run.py"))["main"]
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    handlers = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    default = ["--config", str(config)]
    yield lambda *argv: main(["--shards", str(shards), *([] if "--config" in argv else default), *argv])
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "whole"


@pytest.fixture
def whole(run: Callable[..., int], whole_folder: Path) -> Path:
    """The folder of a run on the tiny settings that nothing happened to."""
    assert whole_folder.exists() or run("--out", str(whole_folder)) == 0
    return whole_folder


@pytest.fixture(scope="session")
def bucket() -> Iterator[Bucket]:
    with s3() as found:
        yield found


@pytest.fixture
def credentials(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucket's in the environment, and a cache folder of the test's own."""
    for name, value in (bucket.environment | {"XDG_CACHE_HOME": str(tmp_path / "user")}).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def proxy(bucket: Bucket) -> Iterator[Proxy]:
    found = Proxy(bucket.endpoint)
    yield found
    found.close()


@pytest.fixture
def network(credentials: None, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(remote, "_RUNNING", QUICK)
    monkeypatch.setattr(remote, "_STARTING", QUICK)
    monkeypatch.setattr(remote, "_CLIENT", {"timeout": timedelta(seconds=20)})
    monkeypatch.setattr(shard_cache, "FREE", 0)
    monkeypatch.setattr(shard_cache, "_PATIENCE", 0.05)
    proxy.faults.clear()
    proxy.down, proxy.latency = False, 0.0


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(write_set(tmp_path_factory.mktemp("data") / "set", IMAGES, SHARDS))


@pytest.fixture(scope="session")
def address(bucket: Bucket, local: Path) -> str:
    return bucket.upload(local, "in1k")


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the objects that parts were asked of."""
    seen: list[str] = []
    get = remote.Folder.get

    async def noted(self: remote.Folder, wanted: remote.Object, start: int, stop: int) -> bytes:
        seen.append(wanted.name)
        return await get(self, wanted, start, stop)

    monkeypatch.setattr(remote.Folder, "get", noted)
    return seen
