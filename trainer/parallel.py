"""Collectives that carry gradients, and who we are among the ranks.

Every loss here is a mean over ranks, because DDP averages gradients; with these two functions the average of the ranks'
gradients is the gradient of the one-process loss. With one process both are the identity and cost nothing.
"""

import inspect
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous

# Newer torch renamed both and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_NAMES = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_BUFFERS_STAY: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


def connect() -> torch.device:
    """The device of this process, set up, and a connection to the other ranks where torchrun started several."""
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Autocast takes the heavy products; what it leaves in fp32 are small differences in losses. TF32 loses those.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = True  # shapes never change
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Ranks that torchrun restarts meet in the store of those before them: without a prefix of their own they would
        # find, and call, addresses of dead processes (torch 2.14).
        store, rank_here, world = next(rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        an_hour = timedelta(hours=1)  # ranks wait while the first one probes
        dist.init_process_group(backend, store=store, rank=rank_here, world_size=world, timeout=an_hour)
    return device


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
        g = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(g)
        return g.chunk(dist.get_world_size())[dist.get_rank()]


def shard_(module: nn.Module, units: list[nn.Module]) -> None:
    """FSDP2: shards the weights of each unit, and of the rest of `module`, over the ranks, in place."""
    for unit in units:
        fully_shard(unit)
    fully_shard(module)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of `x` over all ranks; its gradient is averaged likewise."""
    return x if world_size() == 1 else _Mean.apply(x)


def gather(x: Tensor) -> Tensor:
    """All ranks' `x` (b, ...) one after another along the first axis; gradients of all copies are summed."""
    return x if world_size() == 1 else _Gather.apply(x)


def any_rank(flag: bool) -> bool:
    """Whether `flag` holds on any rank, on every rank: the hosts wait for each other, the devices work on."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(float(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


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
