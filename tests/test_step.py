"""The training step: accumulation, clipping, and losses or gradients that are not finite."""

from itertools import repeat
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer import optim
from trainer.config import Optim
from trainer.method import Method
from trainer.step import TrainingStep


class Regression(Method):
    """Squares of (x - w); `factor` makes the gradient of a step as large as a test wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.factor, self.steps = nn.Parameter(torch.ones(2, 3)), 1.0, 0

    def forward(self, batch: Any, progress: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        error = (batch.x - self.w).square().mean()
        return error * self.factor, {"error": error.detach()}

    def after_step(self, progress: Tensor) -> None:
        self.steps += 1


class FakeBatch(SimpleNamespace):
    def to(self, device: torch.device) -> "FakeBatch":
        return self


def batches(*values: float) -> Any:
    return iter([FakeBatch(x=torch.full((2, 3), v), index=torch.tensor([i])) for i, v in enumerate(values)])


def make(name: Any = "adamw", **settings: Any) -> tuple[Regression, TrainingStep]:
    method = Regression()
    optimizer = optim.build(Optim(name=name, weight_decay=0.0), method)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    return method, TrainingStep(method, optimizer, **settings)


PROGRESS = torch.zeros(())


def test_micro_batches_make_one_step() -> None:
    method, step = make(accumulate=2)
    result = step(batches(2.0, 4.0), PROGRESS)
    assert result.metrics["loss"].item() == result.metrics["error"].item() == 5.0  # the mean of 1 and 9
    assert result.metrics["grad_norm"].item() == pytest.approx(6**0.5 * 2 * 2 / 6)  # of w - 3, 2/6 times, on 6 weights
    assert result.index.tolist() == [0, 1]
    assert method.steps == 1 and method.w.grad is None


@pytest.mark.parametrize("name", ["adamw", "lars"])
@pytest.mark.parametrize("position", [0, 1])
def test_a_micro_batch_that_is_not_finite_changes_no_weight(name: str, position: int) -> None:
    method, step = make(name, accumulate=2)
    values = [2.0, 3.0]
    values[position] = float("nan")
    assert not step(batches(*values), PROGRESS).finite
    assert torch.equal(method.w, torch.ones(2, 3))
    assert step(batches(2.0, 3.0), PROGRESS).finite
    assert not torch.equal(method.w, torch.ones(2, 3))


def test_clipping_bounds_the_step_and_not_the_norm_that_is_logged() -> None:
    method, step = make("lars", clip=1e-3)
    before = method.w.detach().clone()
    assert step(batches(5.0), PROGRESS).metrics["grad_norm"].item() == pytest.approx(6**0.5 * 2 * 4 / 6)
    assert 0 < (method.w - before).norm() <= 0.1 * 1e-3 * before.norm() * 1.01  # LARS: lr x trust x norm of the weights


def test_lars_makes_its_momentum_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, step = make("lars")
    step(batches(5.0), PROGRESS)
    made = [value for state in step.optimizer.state.values() for value in state.values()]
    monkeypatch.setattr(torch, "zeros_like", pytest.fail)
    step(batches(5.0), PROGRESS)
    assert [value for state in step.optimizer.state.values() for value in state.values()] == made


def test_an_overflow_of_the_scaled_loss_is_no_failure() -> None:
    """In fp16 the scale falls until gradients fit, more often than failures are allowed; a NaN fails at any scale."""
    method, step = make("lars", amp_dtype=torch.float16)
    method.w.register_hook(lambda gradient: gradient.half().float())  # as a half-precision layer hands it on
    method.factor = 4096.0  # a gradient of 5461: float16 has room for 8 times as much
    results = []
    for _ in range(14):
        assert torch.equal(method.w, torch.ones(2, 3))
        results.append(step(batches(5.0), PROGRESS))
    assert not torch.equal(method.w, torch.ones(2, 3))
    assert all(result.finite for result in results)
    assert [result.metrics["loss_scale"].item() for result in results] == [2.0**power for power in range(16, 2, -1)]
    method.factor = float("nan")
    assert not step(batches(5.0), PROGRESS).finite


def test_an_overflow_that_no_scale_helps_is_a_failure() -> None:
    method, step = make(amp_dtype=torch.float16)
    method.w.register_hook(lambda gradient: gradient * torch.inf)
    outcomes = [bool(step(stream, PROGRESS).finite) for stream in repeat(batches(*[5.0] * 20), 20)]
    assert outcomes == [True] * 16 + [False] * 4  # 2**16 ... 2, then 1 and below
    assert torch.equal(method.w, torch.ones(2, 3))
