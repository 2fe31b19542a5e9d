"""The examples run as they stand there, and learn something."""

import sys
from pathlib import Path

import pytest
from mapimages import smooth_image, write_set

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import own_recipe
import simclr
import supervised


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_set(tmp_path_factory.mktemp("shards"), count=16, shards=2, make=smooth_image, form="JPEG"))


@pytest.mark.parametrize("example", [supervised, simclr])
def test_a_loop_of_ones_own(example, shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model resnet10t --steps 4 --batch-size 8 --size 32".split()
    assert example.main([shards, *words]) < 5
    assert "step 3: loss" in capsys.readouterr().out


def test_a_recipe_of_ones_own(shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert 0.3 < own_recipe.main(shards) <= 1
    assert "targets['patches']: int32 (8, 4, 36)" in capsys.readouterr().out
