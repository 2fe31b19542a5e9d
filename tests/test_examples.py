"""The examples, and the guide's method, run unchanged."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mapimages import smooth_image, write_set
from runs import ROOT, lines

from trainer import methods

sys.path.insert(0, str(ROOT / "examples"))

import own_recipe
import simclr
import supervised


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_set(tmp_path_factory.mktemp("shards"), count=16, shards=2, make=smooth_image, form="JPEG"))


@pytest.mark.parametrize("example", [supervised, simclr])
def test_a_loop_of_ones_own(example, labelled: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model resnet10t --steps 4 --batch-size 8 --size 32".split()
    assert example.main([labelled, *words]) < 5
    assert "step 3: loss" in capsys.readouterr().out


def test_a_recipe_of_ones_own(labelled: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert 0.3 < own_recipe.main(labelled) <= 1
    assert "targets['patches']: int32 (8, 4, 36)" in capsys.readouterr().out


def test_the_loop_of_the_guide(labelled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/index.md, on smaller images (the folder last: its name may hold a number)."""
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    for there, here in (("160", "32"), ("64", "8"), ("18", "10t"), ('"shards", split="train"', repr(labelled))):
        assert there in text
        text = text.replace(there, here)
    names: dict = {}
    exec(text, names)
    names["loader"].close()
    assert names["loss"].item() < 10 and names["state"]["epoch"] == 1


def test_the_method_of_the_guide(run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/new_method.md, as it stands there: one file, and the program trains it."""
    text = (ROOT / "docs" / "new_method.md").read_text(encoding="utf-8")
    (tmp_path / "matched.py").write_text(text.split("```python\n")[1].split("```")[0])
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trainer.methods.matched", raising=False)
    words = "--method matched --matched.backbone vit_pico_patch8 --matched.views.size 64 --steps 2"
    (tmp_path / "tiny.yaml").write_text("batch_size: 8\nlog: {every: 1, tensorboard: false}\n")
    assert run("--out", str(tmp_path / "out"), *words.split()) == 0
    assert 0 < lines(tmp_path / "out")[-1]["feature_std"] < 2
