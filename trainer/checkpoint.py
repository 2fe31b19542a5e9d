"""Checkpoints: one file a step, whole or absent.

`last` links to the newest. A file that cannot be read is passed over, with a warning, for the one before it. Nothing is
unpickled: tensors and plain values only (`weights_only=True`).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from pipeline import host
from trainer import config, methods, parallel
from trainer.method import Method

FORMAT = 1
Payload = dict[str, Any]
NEEDED = {"step": int, "method": str, "config": str, "model": dict}  # the config is YAML
OPTIONAL = {"optimizer": dict, "loader": dict, "scaler": dict}  # what a run needs to go on


def save(folder: Path, payload: Payload, keep_last: int, keep_every: int | None) -> bool:
    """Writes `payload` as ``folder/step_XXXXXXXXX.pt`` and removes what need not be kept. False if the disk refused.

    A full disk costs this checkpoint, not the run and not the checkpoints before it. One process at a time may save.
    """
    target = folder / f"step_{payload['step']:09d}.pt"
    try:
        for part in folder.glob("*.part"):  # of a writer that was killed
            part.unlink()
        write(target, payload)
        link = folder / "last.part"
        link.symlink_to(target.name)
        link.replace(folder / "last")
        host.sync_folder(folder)
    except OSError as error:
        warnings.warn(f"no checkpoint at step {payload['step']}: {error}; the ones before it are kept", stacklevel=2)
        return False
    for path in _paths(folder)[keep_last:]:
        if not (keep_every and _step(path) % keep_every == 0):
            path.unlink(missing_ok=True)
    return True


def write(path: Path, payload: Payload) -> None:
    """Writes one file, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        host.write_atomic(path, lambda file: torch.save({"format": FORMAT, **payload}, file))
    except RuntimeError as error:  # torch hides a full disk behind one of its own
        raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from None


def load(path: Path) -> Payload:
    """The checkpoint in `path` (a file, or a folder's newest readable one). Raises ValueError naming what is wrong."""
    if path.is_dir():
        payload = latest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        if payload is None:
            raise ValueError(f"{path}: holds no readable checkpoint")
        return payload
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file fails in a dozen ways
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        found = payload.get("format") if isinstance(payload, dict) else None
        raise ValueError(f"{path}: not a checkpoint of format {FORMAT} (found {found})")
    for key, kind in (NEEDED | {key: kind for key, kind in OPTIONAL.items() if key in payload}).items():
        if not isinstance(payload.get(key), kind):
            raise ValueError(f"{path}: not a whole checkpoint, its {key!r} is no {kind.__name__}")
    weights = payload["model"].values()
    if payload["step"] < 0 or not weights or not all(isinstance(value, torch.Tensor) for value in weights):
        raise ValueError(f"{path}: not a whole checkpoint, its 'step' is below 0 or its 'model' holds no tensors")
    return payload


def latest(folder: Path) -> Payload | None:
    """The newest checkpoint in `folder` that can be read; None where there is none.

    Raises ValueError where there are some and none can be read: whoever goes on without would overwrite them.
    """
    for path in _paths(folder):
        try:
            return load(path)
        except ValueError as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    if _paths(folder):
        raise ValueError(f"{folder}: holds no readable checkpoint, only damaged ones; move them away to start over")
    return None


def resume(folder: Path) -> Payload | None:
    """`latest`, read by rank 0 alone; the others learn all but the tensors, which `set_state` hands to them."""
    payload = latest(folder) if parallel.rank() == 0 else None
    if parallel.world_size() > 1:
        shared = [payload and {**payload, "model": {}, "optimizer": {}}]
        dist.broadcast_object_list(shared)
        payload = payload or shared[0]
    return payload


def restore(payload: Payload) -> Method:
    """The method that a checkpoint holds, with its settings and weights. Raises ValueError if they do not fit."""
    name = payload["method"]
    if name not in methods.names():
        raise ValueError(f"the checkpoint is of method {name!r}, which is none of {', '.join(methods.names())}")
    with _one_sentence(f"the checkpoint's settings of {name} cannot be used"):
        settings = config.load_yaml(payload["config"])
        if not isinstance(settings, dict) or not isinstance(settings.get(name), dict):
            raise ValueError(f"they hold no mapping {name!r}")
        method: Method = methods.load(name).Method(methods.config(name, settings[name]))
    with _one_sentence("the checkpoint's weights do not fit its settings"):
        method.load_state_dict(payload["model"])
    return method


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Whatever a lying file leads to becomes a ValueError of one sentence."""
    try:
        yield
    except Exception as error:  # a file can lie in more ways than errors have types
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise ValueError(f"{what}: {reason}") from None


def state(method: nn.Module, optimizer: torch.optim.Optimizer) -> Payload:
    """Weights and optimizer state, by name and whole, on the host; every rank must ask, rank 0 is answered.

    By name, so that a run can go on with another number of ranks, sharded or not.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optim = get_state_dict(method, optimizer, options=options)
    return {"model": model, "optimizer": optim}


def set_state(method: nn.Module, optimizer: torch.optim.Optimizer, payload: Payload) -> None:
    """The way back, from rank 0's payload on every rank. Raises ValueError where names or shapes do not fit."""
    trainable = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    with _one_sentence("the checkpoint was made with other settings of the method or the optimizer"):
        # torch would take an absent state for a fresh start
        if parallel.rank() == 0 and (lacking := trainable - set(payload["optimizer"]["state"])):
            raise KeyError(min(lacking))
        set_model_state_dict(method, payload["model"], options=_from_rank_0())
        set_optimizer_state_dict(method, optimizer, payload["optimizer"], options=_from_rank_0())


def set_weights(method: nn.Module, payload: Payload) -> None:
    """The weights alone, to begin with. Raises ValueError where names or shapes do not fit."""
    with _one_sentence("the checkpoint's weights do not fit the method's settings"):
        set_model_state_dict(method, payload["model"], options=_from_rank_0())


def _from_rank_0() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, strict=True, broadcast_from_rank0=parallel.world_size() > 1)


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.pt"), reverse=True)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))
