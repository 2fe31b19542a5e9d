"""The training step, shared by `run.py`, `--dry-run`, the benchmarks and the GPU checks."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function as span

from pipeline import Batch
from trainer import parallel
from trainer.method import Method


@dataclass(frozen=True)
class StepResult:
    """The results of a step. They are still being computed on the device: reading a value waits for it."""

    metrics: dict[str, Tensor]  # 0-d, on the device: "loss", the method's own (means over micro-batches), "grad_norm"
    finite: Tensor  # 0-d bool, on the device, equal on all ranks: False if the step failed, which changes no weight
    index: Tensor  # i64 (samples of this rank,), on the host


class TrainingStep:
    """Gradient accumulation, autocast, backward pass, clipping, optimizer step and the method's `after_step`.

    `model` is the wrapper that synchronises gradients (DDP), if there is one. A step changes no weight if its loss or
    gradient is not finite on any rank. The device decides this, so the host never waits. With ``amp_dtype`` float16
    the loss is scaled. A gradient that overflows while the scale is above 1 only lowers the scale: the step is skipped
    but does not count as a failure.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        *,
        model: nn.Module | None = None,
        accumulate: int = 1,
        amp_dtype: torch.dtype | None = None,
        clip: float | None = None,
    ) -> None:
        self.method = method
        self.optimizer: Any = optimizer  # Any: `found_inf` and `grad_scale` are set as attributes
        self.trainable = [p for p in method.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(self.trainable[0].device.type, enabled=amp_dtype == torch.float16)
        self._model: Any = model or method
        self._accumulate, self._amp_dtype, self._clip = accumulate, amp_dtype, clip

    def __call__(self, batches: Iterator[Batch], progress: Tensor) -> StepResult:
        """Take `accumulate` micro-batches from `batches` and do one optimizer step. `progress` is 0-d, in [0, 1]."""
        device = progress.device
        losses_finite = torch.ones((), device=device)
        parts: dict[str, list[Tensor]] = {}
        indices = []
        for i in range(self._accumulate):
            with span("data"):
                batch = next(batches).to(device)
            last = i + 1 == self._accumulate
            with nullcontext() if last or self._model is self.method else self._model.no_sync():
                with span("forward"), torch.autocast(device.type, self._amp_dtype, enabled=self._amp_dtype is not None):
                    loss, metrics = self._model(batch, progress)
                with span("backward"):
                    self.scaler.scale(loss / self._accumulate).backward()
            for name, value in {"loss": loss, **metrics}.items():
                parts.setdefault(name, []).append(value.detach().float())
            losses_finite = losses_finite * torch.isfinite(loss.detach())
            indices.append(batch.index)
        with span("optimizer"):
            self.scaler.unscale_(self.optimizer)
            norm = clip_(self.trainable, self._clip)  # the norm includes the FSDP shards of all ranks
            losses_finite = parallel.mean_over_ranks(losses_finite) == 1
            finite = losses_finite & torch.isfinite(norm)
            # The optimizers read this flag and skip the step, as they do with a gradient scaler.
            self.optimizer.found_inf, self.optimizer.grad_scale = (~finite).float(), None
            self.optimizer.step()
            if self.scaler.is_enabled():
                scale = self.scaler.scale(torch.ones_like(norm))
                finite = finite | (losses_finite & (scale > 1))
                parts["loss_scale"] = [scale]
                self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        with span("after_step"):
            self.method.after_step(progress)
        means = {name: v[0] if len(v) == 1 else torch.stack(v).mean() for name, v in parts.items()}
        return StepResult({**means, "grad_norm": norm}, finite, torch.cat(indices))


def clip_(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """Scale the gradients in place to a global norm of at most `limit`. Return the norm before clipping, 0-d."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
