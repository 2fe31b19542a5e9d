"""Ranks: connecting, DDP and FSDP, collectives with and without gradients.

Every loss here is a mean over ranks, because DDP averages gradients; with `mean_over_ranks` and `gather` inside a loss,
the average of the ranks' gradients is the gradient of the one-process loss. With one process both are the identity.
"""

import inspect
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous

# Newer torch renamed these and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_NAMES = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_BUFFERS_STAY: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}
_PATIENCE = timedelta(minutes=30)  # of a rank that waits for another: the first one probes, and opens remote sets
K = TypeVar("K")
T = TypeVar("T")


def connect() -> torch.device:
    """The device of this process, set up, and a connection to the other ranks where torchrun started several."""
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Autocast takes the heavy products; what it leaves in fp32 are small differences in losses. TF32 loses those.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = True  # shapes never change
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        store, rank_here, world = next(rendezvous("env://", timeout=_PATIENCE))
        store.set_timeout(_PATIENCE)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(_meet(store, rank_here, world), store),
            rank=rank_here,
            world_size=world,
            timeout=_PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )
    return device


def _meet(store: dist.Store, rank_here: int, world: int) -> str:
    """A name that these ranks alone know, for what they keep in `store`.

    Ranks that torchrun restarts get the store of those before them, and torch takes addresses of dead processes from
    it. No variable tells the starts apart: a node that joins counts restarts from 0, and a change of the number of
    nodes is not counted. So each rank asks under a name of its own until rank 0, which may read a dead rank's question
    first, has answered it.
    """
    mine = secrets.token_hex(8)
    if rank_here > 0:
        store.set(f"question of {rank_here}", mine)
        name = store.get(f"answer to {mine}").decode()
        store.set(f"{name}: {rank_here} is here", "")
        return name
    for other in range(1, world):
        deadline = time.monotonic() + _PATIENCE.total_seconds()
        while not store.check([f"{mine}: {other} is here"]):
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {other} of {world} has not come within {_PATIENCE}")
            if store.check([f"question of {other}"]):
                store.set(f"answer to {store.get(f'question of {other}').decode()}", mine)
            time.sleep(0.01)
    return mine


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clone(memory_format=torch.contiguous_format)  # collectives take nothing else
        dist.all_reduce(y)
        return y / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        g = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(g)
        return g / dist.get_world_size()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.new_empty((dist.get_world_size() * x.shape[0], *x.shape[1:]))
        _all_gather(y, x.contiguous())
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        g = grads[0].contiguous()
        mine = g.new_empty((g.shape[0] // dist.get_world_size(), *g.shape[1:]))
        _reduce_scatter(mine, g)
        return mine


def shard_(
    module: nn.Module,
    units: list[nn.Module],
    device: torch.device,
    *,
    copies: int = 1,
    gather: torch.dtype | None = None,
) -> None:
    """FSDP2: shards the weights of each unit, and of the rest of `module`, over the ranks, in place.

    With `copies`, each part of the ranks holds all of them (HSDP). Raises ValueError where they cannot be parted so.
    Weights of the units are gathered as `gather`, which autocast must take; the rest, where the losses are, and all
    gradients travel as they are stored.
    """
    if world_size() % copies:
        raise ValueError(f"{world_size()} ranks cannot hold {copies} copies of the weights in equal parts")
    mesh = init_device_mesh(device.type, (copies, world_size() // copies), mesh_dim_names=("copies", "shards"))
    where = mesh if copies > 1 else mesh["shards"]
    # Autocast casts what it needs: inputs stay as they are, and so do the sums along the blocks.
    policy = MixedPrecisionPolicy(param_dtype=gather, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units:
        fully_shard(unit, mesh=where, mp_policy=policy)
    fully_shard(module, mesh=where)


def compile_(units: list[nn.Module], backend: str = "inductor") -> None:
    """Compiles each unit's forward pass in place: a graph for each shape that it is called with.

    Torch counts the graphs of one code, and runs what comes after the eighth without compiling it: blocks share theirs,
    and each may have a drop rate of its own.
    """
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit
    for unit in units:
        unit.compile(dynamic=False, backend=backend)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of `x` over all ranks; its gradient is averaged likewise."""
    return x if world_size() == 1 else _Mean.apply(x)


def gather(x: Tensor) -> Tensor:
    """All ranks' `x` (b, ...) one after another along the first axis; gradients of all copies are summed."""
    return x if world_size() == 1 else _Gather.apply(x)


def largest(number: int) -> int:
    """The largest of the ranks' numbers, on every rank: the hosts wait for each other, the devices work on."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers.item())


@contextmanager
def agreed() -> Iterator[None]:
    """What the block raises on one rank, it raises on all of them: nobody waits for a rank that has ended.

    There must be no collective inside.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    errors: list[Exception | None] = [mine]
    if world_size() > 1:
        errors = [None] * world_size()
        dist.all_gather_object(errors, mine)
    for raised in (mine, *errors):
        if raised:
            raise raised from None


def from_rank_0(value: T) -> T:
    """What `value` is on rank 0; it must be picklable."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def merged(mapping: dict[K, T]) -> dict[K, T]:
    """The mappings of all ranks in one; they must be picklable."""
    parts = [mapping]
    if world_size() > 1:
        parts = [mapping] * world_size()
        dist.all_gather_object(parts, mapping)
    return {key: value for part in parts for key, value in part.items()}


def any_rank(flag: bool) -> bool:
    """Whether `flag` holds on any rank, on every rank, as `largest` does it."""
    return largest(flag) > 0


def sum_over_ranks_(x: Tensor) -> Tensor:
    """Sums `x` over the ranks in place, without a gradient (Sinkhorn's column sums)."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """DDP. Gradients are views of what is sent, one copy less; buffers are not: equal weights make equal ones."""
    return nn.parallel.DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **_BUFFERS_STAY,
    )
