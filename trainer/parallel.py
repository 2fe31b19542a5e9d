"""Distributed training: process groups, DDP and FSDP, collectives with and without gradients.

Every loss here is a mean over ranks, because DDP averages gradients. If a loss uses `mean_over_ranks` and `gather`, the
average of the ranks' gradients is the gradient of the one-process loss. With one process, both are the identity.
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

# Newer versions of torch renamed these and warn about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_NAMES = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_BUFFERS_STAY: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}
_PATIENCE = timedelta(minutes=30)  # for collectives: ranks wait while rank 0 probes and opens remote sets
K = TypeVar("K")
T = TypeVar("T")


def connect() -> torch.device:
    """Set up and return the device of this process. Connect to the other ranks if torchrun started several."""
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Autocast covers the large products. What stays in fp32, small differences in losses, would be lost in TF32.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = True  # pays off because shapes never change
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
    """Agree on a random key prefix for `store` that is unique to this start of the ranks, and return it.

    Ranks that torchrun restarts get the store of the previous start, and torch would read the addresses of dead
    processes from it. No variable identifies a start: a node that joins counts restarts from 0, and a change of the
    number of nodes is not counted. Hence each rank posts a question with a random token and waits until rank 0 answers
    this token. Rank 0 may read a dead rank's question first, so it answers until every living rank has confirmed.
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
        y = x.clone(memory_format=torch.contiguous_format)  # collectives need contiguous tensors
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
    """Shard the weights of each unit, and of the rest of `module`, over the ranks, in place (FSDP2).

    With `copies` above 1, the ranks form that many groups, and each group holds all weights (HSDP). Raises ValueError
    if the ranks do not divide into equal groups. Weights of the units are gathered in the type `gather`, which must be
    autocast's. The rest, which computes the losses, is gathered as stored. Gradients are reduced in fp32.
    """
    if world_size() % copies:
        raise ValueError(f"{world_size()} ranks cannot hold {copies} copies of the weights in equal parts")
    mesh = init_device_mesh(device.type, (copies, world_size() // copies), mesh_dim_names=("copies", "shards"))
    where = mesh if copies > 1 else mesh["shards"]
    # Autocast casts where needed. FSDP must not cast inputs: the residual stream stays in its own precision.
    policy = MixedPrecisionPolicy(param_dtype=gather, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units:
        fully_shard(unit, mesh=where, mp_policy=policy)
    fully_shard(module, mesh=where)


def compile_(units: list[nn.Module], backend: str = "inductor") -> None:
    """Compile each unit's forward pass in place, with one graph for each input shape.

    By default, torch stops compiling after eight graphs of the same code. The limit is raised here, because all blocks
    share their code and each may have its own drop rate.
    """
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit
    for unit in units:
        unit.compile(dynamic=False, backend=backend)


def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean of `x` over all ranks. Its gradient is averaged over ranks as well."""
    return x if world_size() == 1 else _Mean.apply(x)


def gather(x: Tensor) -> Tensor:
    """Concatenate all ranks' `x` (b, ...) along the first axis. Its gradient is summed over ranks."""
    return x if world_size() == 1 else _Gather.apply(x)


def largest(number: int) -> int:
    """Return the largest of the ranks' numbers. Only the hosts wait for each other; the devices continue."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers.item())


@contextmanager
def agreed() -> Iterator[None]:
    """Raise an exception of the block on every rank, so that none waits for a rank that has ended.

    The block must not contain collectives.
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
    """Broadcast rank 0's `value`, which must be picklable."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def merged(mapping: dict[K, T]) -> dict[K, T]:
    """Merge the mappings of all ranks, which must be picklable."""
    parts = [mapping]
    if world_size() > 1:
        parts = [mapping] * world_size()
        dist.all_gather_object(parts, mapping)
    return {key: value for part in parts for key, value in part.items()}


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is true on any rank. Synchronises the hosts only, like `largest`."""
    return largest(flag) > 0


def sum_over_ranks_(x: Tensor) -> Tensor:
    """Sum `x` over the ranks in place, without a gradient. Used for Sinkhorn's column sums and for metrics."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """Wrap `module` in DDP. Gradients are views of the communication buckets, which saves a copy of them.

    Buffers are not broadcast: the same computation yields the same buffers on every rank.
    """
    return nn.parallel.DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **_BUFFERS_STAY,
    )
