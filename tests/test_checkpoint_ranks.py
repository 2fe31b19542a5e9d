"""Checkpoints with several ranks: rank 0 reads for all, and a checkpoint that it cannot use ends all ranks alike."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import free_port, start
from torch import nn

from trainer import checkpoint

FILE = "step_000000007.pt"


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    method = nn.Linear(3, 2)
    return method, torch.optim.AdamW(method.parameters())


def write_damaged(folder: Path) -> dict[str, str]:
    """A folder of each kind of damage, and what is to be said of it."""
    method, optimizer = network()
    whole = {
        "step": 7,
        "method": "any",
        "config": "",
        "loader": {},
        "scaler": {},
        **checkpoint.state(method, optimizer),
    }
    optim = whole["optimizer"]
    cases = {
        "torn": (None, "holds no readable checkpoint"),
        "weights of other shapes": ({"model": {**whole["model"], "bias": torch.zeros(5)}}, "bias"),
        "too many weights": ({"model": {**whole["model"], "more": torch.zeros(5)}}, "more"),
        "too few weights": ({"model": {"weight": whole["model"]["weight"]}}, "bias"),
        "no state of the optimizer": ({"optimizer": {**optim, "state": {}}}, "lacks 'weight'"),
        "moments of other shapes": (
            {"optimizer": {**optim, "state": {name: {"exp_avg": torch.zeros(9)} for name in ("weight", "bias")}}},
            "exp_avg",
        ),
        "no groups": ({"optimizer": {**optim, "param_groups": [{"params": []}]}}, "groups"),
        "no optimizer": ({"optimizer": None}, "optimizer"),
        "no state of the scaler": ({"scaler": None}, "scaler"),
    }
    for name, (change, _) in cases.items():
        target = folder / name / FILE
        checkpoint.write(target, {k: v for k, v in {**whole, **(change or {})}.items() if v is not None})
        if change is None:
            target.write_bytes(target.read_bytes()[:-100])
    return {name: words for name, (_, words) in cases.items()}


def all_say_the_same(rank: int, world: int, port: str, folder: Path, cases: dict[str, str]) -> None:
    start(rank, world, port)
    for name, words in cases.items():
        method, optimizer = network()
        with pytest.raises(ValueError) as refused:
            checkpoint.resume(folder / name, "any", method, optimizer)
        said = [None] * world
        dist.all_gather_object(said, str(refused.value))
        assert words in str(said[0]) and "\n" not in str(said[0]), (name, said)
        assert FILE in str(said[0]) or "no readable" in str(said[0])
        assert said == said[:1] * world, said
    method, optimizer = network()
    assert checkpoint.resume(folder / "nowhere", "any", method, optimizer) is None
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*trying the one before it")
def test_a_damaged_checkpoint_ends_all_ranks_with_one_sentence(tmp_path: Path) -> None:
    """Where rank 0 ended alone, the others would wait for it in a broadcast until their patience ends."""
    mp.spawn(all_say_the_same, (2, free_port(), tmp_path, write_damaged(tmp_path)), 2)
