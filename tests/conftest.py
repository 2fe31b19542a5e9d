"""One thread for torch (tiny models gain nothing from a second one, and DALI has the other core); runs to test."""

import io
import runpy
import signal
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import skimage
import torch
from PIL import Image
from runs import ROOT, TINY

from trainer import interrupt

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="record the seeded losses again: results changed")


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
