"""The bundled photographs' shards: made once, by one process; otherwise an error of one sentence."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trainer import demo
from trainer.config import UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_first_runs_side_by_side_make_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make(pictures: Path, folder: Path) -> None:
        made.append(folder)
        time.sleep(0.2)
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")

    monkeypatch.setattr(demo, "_make", make)
    with ThreadPoolExecutor(3) as pool:
        folders = {future.result() for future in [pool.submit(demo.shards) for _ in range(3)]}
    assert len(made) == len(folders) == 1


def test_a_sharder_that_fails_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sharder.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(demo, "SHARDER", tmp_path / "sharder.py")
    monkeypatch.setattr(demo, "CROPS", 1)
    with pytest.raises(UsageError, match=r"exit code 3.*--shards"):
        demo.shards()


def test_a_cache_that_cannot_be_written_is_a_sentence(cache: Path) -> None:
    (cache / "dense-ssl").write_text("")
    with pytest.raises(UsageError, match="XDG_CACHE_HOME"):
        demo.shards()
