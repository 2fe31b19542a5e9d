"""Collectives over two gloo ranks: values and gradients are those of one process, eager and compiled."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import free_port, start
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer import parallel
from trainer.backbones import blocks, vit
from trainer.segmentation.metric import Confusion


def loss(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Uses all three collectives; the per-rank losses differ, as their local terms do."""
    y = x @ weight
    mean = parallel.mean_over_ranks(y.softmax(1).mean(0))
    everyone = parallel.gather(y.T.contiguous().T)  # not contiguous on purpose
    columns = parallel.sum_over_ranks_(y.detach().exp().sum(0))
    return (mean * mean.log()).sum() + (everyone.T @ everyone).square().mean() + (y / columns).sum(1).mean()


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return weight, torch.randn(8, 5, generator=generator, dtype=torch.float64)


def ranks_agree_with_one_process(rank: int, world: int, port: str, compiled: bool) -> None:
    weight, x = problem()
    alone = weight.clone().requires_grad_()
    expected = loss(alone, x)  # no process group yet: one process
    expected.backward()

    start(rank, world, port)
    function = torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss
    shared = weight.clone().requires_grad_()
    value = function(shared, x.chunk(world)[rank])
    value.backward()
    for mine, theirs in ((value.detach(), expected.detach()), (shared.grad, alone.grad)):
        average = mine.clone()
        dist.all_reduce(average)
        torch.testing.assert_close(average / world, theirs, rtol=1e-12, atol=1e-12)
    assert parallel.largest(rank) == world - 1 and parallel.largest(-2) == -2
    assert parallel.any_rank(rank == 1) and not parallel.any_rank(False)
    assert parallel.rank() == rank and parallel.world_size() == world

    predicted, truth = torch.randint(3, (2, 8, 5), generator=torch.Generator().manual_seed(0))
    whole, part = Confusion(3), Confusion(3)
    whole.add(predicted, truth)
    part.add(predicted.chunk(world)[rank], truth.chunk(world)[rank])
    assert torch.equal(parallel.sum_over_ranks_(part.matrix), whole.matrix) and part.miou == whole.miou
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_agree_with_one_process(world: int) -> None:
    mp.spawn(ranks_agree_with_one_process, (world, free_port(), False), world)


@pytest.mark.slow
def test_the_collectives_compile_into_one_graph() -> None:
    mp.spawn(ranks_agree_with_one_process, (2, free_port(), True), 2)


class Sent(TorchDispatchMode):
    """Notes what collectives send: their names, types and numbers of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensor = next(a for a in tree_leaves(args[1:]) if isinstance(a, torch.Tensor))
            self.seen.append((func._opname, tensor.dtype, tensor.numel()))
        return func(*args, **(kwargs or {}))


def narrow_weights_travel(rank: int, world: int, port: str) -> None:
    start(rank, world, port)
    found = {}
    for gather in (None, torch.bfloat16):
        torch.manual_seed(0)
        network = vit("vit_pico_patch16", size=32).train()
        units = blocks(network)
        wide = sum(p.numel() for unit in units for p in unit.parameters())
        parallel.shard_(network, units, torch.device("cpu"), gather=gather)
        with Sent() as sent:
            with torch.autocast("cpu", torch.bfloat16):
                y = network(torch.randn(2, 3, 32, 32))
            y.square().mean().backward()
        gathered = [(kind, count) for name, kind, count in sent.seen if "gather" in name]
        narrow = sum(world * count for kind, count in gathered if kind == torch.bfloat16)
        # Each block's weights in the forward pass, and again in the backward pass.
        assert narrow == (2 * wide if gather else 0), sent.seen
        assert {kind for name, kind, _ in sent.seen if "reduce" in name} == {torch.float32}
        grads = {name: p.grad.full_tensor() for name, p in network.named_parameters() if isinstance(p.grad, DTensor)}
        assert all(p.dtype == torch.float32 for p in network.parameters()) and len(grads) > 20
        found[gather] = y.detach(), grads
    (y, grads), (y_narrow, grads_narrow) = found.values()
    assert y.dtype == torch.float32 and torch.equal(y, y_narrow)  # autocast takes those products in bf16 anyway
    for name, grad in grads.items():
        assert (grad - grads_narrow[name]).norm() <= 1e-2 * grad.norm(), name
    dist.destroy_process_group()


@pytest.mark.slow
def test_weights_are_gathered_as_bf16_and_gradients_reduced_as_fp32() -> None:
    mp.spawn(narrow_weights_travel, (2, free_port()), 2)


def test_each_start_of_the_ranks_has_a_name_of_its_own() -> None:
    """In one store, whatever those before them left there: a rank that died as it asked, and other numbers of ranks."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    server.set("question of 1", "a dead rank's")
    names = []
    for world in (2, 3, 2):
        clients = [dist.TCPStore("localhost", server.port) for _ in range(world)]
        with ThreadPoolExecutor(world) as pool:
            met = [*pool.map(parallel._meet, clients, range(world), [world] * world)]
        assert met == met[:1] * world
        names += met[:1]
    assert len({*names}) == 3


@pytest.mark.slow
def test_every_block_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ViT's twelve, each with a drop rate of its own: more than torch compiles of one code by default."""
    network = vit("vit_tiny_patch16", size=32, drop_path=0.1).train()
    found = blocks(network)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", torch._dynamo.config.recompile_limit)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    parallel.compile_(found, backend="eager")
    network(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert len(found) > 8


def test_what_one_rank_raises_one_process_raises() -> None:
    with pytest.raises(OSError, match="away"), parallel.agreed():
        raise OSError("away")
    assert parallel.from_rank_0({"a": 1}) == parallel.merged({"a": 1}) == {"a": 1}


def test_one_process_pays_nothing() -> None:
    x = torch.ones(2)
    assert parallel.gather(x) is x and parallel.mean_over_ranks(x) is x and parallel.sum_over_ranks_(x) is x
    assert parallel.largest(2) == 2
    assert parallel.rank() == 0 and parallel.world_size() == 1
