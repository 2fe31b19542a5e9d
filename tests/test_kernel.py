"""Compiled kernels are cached on disk, and never used after their source code has changed."""

import importlib
import os
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType

import numba
import pytest

NAME = "pipeline_copy"
PACKAGE = Path(__file__).resolve().parents[1] / "pipeline"


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package that nothing was compiled from yet."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # edits within a second would go unnoticed by Python itself
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    return Path(shutil.copytree(PACKAGE, tmp_path / NAME, ignore=shutil.ignore_patterns("__pycache__")))


def load(module: str) -> ModuleType:
    """A module of the copy, as a new process would import it."""
    for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[name]
    return importlib.import_module(f"{NAME}.{module}")


def test_a_kernel_is_compiled_once_and_again_when_a_file_that_goes_into_it_changes(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def weights() -> tuple[int, ...]:
        return cutting.resize_weights(10, 5, 0)[2].shape

    cutting = load("cutting")
    assert weights() == (5, 3)
    assert [record.message for record in caplog.records if record.name == NAME] == [
        "compiling kernels; they are kept for the next time"
    ]
    caplog.clear()
    cutting = load("cutting")
    assert weights() == (5, 3)
    assert sum(cutting.resize_weights.stats.cache_hits.values()) == 1 and not caplog.records
    text = (copy / "parameters.py").read_text()
    swapped = text.replace("BILINEAR, BILINEAR_ANTIALIAS, BICUBIC", "BILINEAR_ANTIALIAS, BILINEAR, BICUBIC", 1)
    assert swapped != text
    (copy / "parameters.py").write_text(swapped)
    cutting = load("cutting")
    assert weights() == (5, 5)  # 0 is the antialiased filter now, twice as wide


def test_what_is_compiled_lies_in_one_folder_and_old_ones_go(copy: Path) -> None:
    kept = copy / "__pycache__"
    for name, days in (("kernels-old", 60), ("kernels-used", 2), ("other", 60)):
        (kept / name).mkdir(parents=True)
        os.utime(kept / name, (time.time() - days * 86400,) * 2)
    assert load("order")._bits(5) == 3
    (ours,) = {path.name for path in kept.iterdir()} - {"kernels-used", "other"}
    assert len(list((kept / ours).rglob("order._bits*"))) == 2
    assert set(kept.rglob("*.nb?")) == set((kept / ours).rglob("*.nb?"))


@pytest.mark.parametrize("home", ["writable", "not writable", "missing"])
def test_a_package_that_cannot_be_written_to(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    """Kernels are kept in the user's cache, or not at all: each process compiles its own."""
    (copy / "__pycache__").write_text("a file where the folder should be")  # not writable, even by root
    if home == "not writable":
        (tmp_path / "cache").write_text("likewise")
    elif home == "missing":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    bits = load("order")._bits
    assert bits(5) == 3
    assert bool(bits.stats.cache_path) == (home == "writable")
    assert bool(list(tmp_path.glob("cache/dense-ssl/kernels/kernels-*/**/*.nbc"))) == (home == "writable")


def test_numbas_own_setting_is_followed_and_left_alone(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "mine"))
    assert load("order")._bits(5) == 3
    assert list(tmp_path.glob("mine/kernels-*/**/*.nbc"))
    assert Path(numba.config.CACHE_DIR) == tmp_path / "mine"
