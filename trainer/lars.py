"""LARS, the optimizer of large-batch convolutional networks."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Momentum SGD in which the step of each weight tensor is proportional to its norm (You et al. 2017).

    The formulas are those of the released VICReg and VICRegL code: g = grad + weight_decay * p, scaled by
    trust * |p| / |g| (by 1 if a norm is 0); m = momentum * m + g; p -= lr * m. One-dimensional parameters (biases,
    gains) get neither decay nor scaling. If `found_inf` is set, as a gradient scaler does, the step is a no-op. This is
    decided on the device, so the host does not wait.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None  # 0-d or (1,), 1 where the gradients are not finite

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for scaled in (True, False):
                parameters = [p for p in group["params"] if p.grad is not None and (p.ndim > 1) == scaled]
                if parameters:
                    self._step(parameters, group, scaled)
        return loss

    def _step(self, parameters: list[Tensor], group: dict[str, Any], scaled: bool) -> None:
        gradients: Any = [p.grad for p in parameters]
        for p in parameters:
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        lr, momentum = group["lr"], group["momentum"]
        if scaled:
            gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
            ours, theirs = (torch.stack(torch._foreach_norm(x)) for x in (parameters, gradients))
            trust = torch.where((ours > 0) & (theirs > 0), group["trust"] * ours / theirs, 1.0)
            gradients = torch._foreach_mul(gradients, list(trust.unbind()))
        if (found := self.found_inf) is not None:  # a no-op: gradients 0, momentum 1, learning rate 0
            stay = found.reshape(()) > 0
            gradients = [torch.where(stay, 0.0, g) for g in gradients]
            momentum, lr = torch.where(stay, 1.0, momentum), torch.where(stay, 0.0, lr)
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        torch._foreach_sub_(parameters, torch._foreach_mul(buffers, lr))
