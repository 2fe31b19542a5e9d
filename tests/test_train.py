"""The program as a function: `trainer.train`."""

import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from runs import TINY, assert_same_run, final, lines

import trainer
from trainer import interrupt
from trainer.config import UsageError


def test_it_is_the_program(shards: Path, tmp_path: Path, whole: Path) -> None:
    """Stopped after a step and resumed by its folder alone it is the run of the command, bit for bit."""
    settings = yaml.safe_load(TINY)
    loca = settings.pop("loca")
    handlers = [signal.getsignal(number) for number in interrupt.SIGNALS]
    nested = {f"loca.{name}": value for name, value in loca.items() if name != "views"} | {"loca.views": loca["views"]}
    first = trainer.train(method="loca", shards=shards, out=tmp_path, stop_after=0, **settings, **nested)
    assert (first.state, first.step, first.of) == ("stopped", 1, 6)
    last = trainer.train(out=tmp_path, stop_after=None)
    assert (last.out, last.state, last.step) == (tmp_path, "done", 6)
    assert last.record["loss"] == lines(tmp_path)[-1]["loss"]
    assert_same_run(tmp_path, whole)
    assert [signal.getsignal(number) for number in interrupt.SIGNALS] == handlers
    assert trainer.load(tmp_path).width == final(tmp_path)["model"]["teacher.backbone.norm.weight"].shape[0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"optim": {"lrr": 1}}, "did you mean 'optim.lr'"),
        ({"batch_size": 24}, "24 is more than the 20 images there are"),
        ({"shards": "/nowhere/at/all"}, "--shards /nowhere/at/all: there is no such file"),
        ({"method": "lorca"}, "did you mean 'loca'"),
    ],
)
def test_a_mistake_is_one_sentence(
    run: Callable[..., int], shards: Path, tmp_path: Path, settings: dict, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        trainer.train(**{"shards": shards, "out": tmp_path / "out", "config": tmp_path / "tiny.yaml", **settings})


def test_threads_of_a_program_sleep_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ``python -m trainer.segment`` and its kin, not of a program that imports the package."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    for name, expected in (("own.py", None), ("-m", "passive")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.setattr(sys, "argv", [name])
        importlib.reload(trainer)
        assert os.environ.get("OMP_WAIT_POLICY") == expected
