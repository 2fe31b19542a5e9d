"""LARS against a calculation by hand, and the step that it skips."""

import torch

from trainer.lars import LARS


def test_lars_by_hand():
    torch.manual_seed(0)
    weight, gain, still = (torch.nn.Parameter(torch.randn(s)) for s in ((3, 4), (5,), (2, 2)))
    with torch.no_grad():
        still.zero_()  # norm 0: trust 1
    start = [p.detach().clone().double() for p in (weight, gain, still)]
    optimizer = LARS([{"params": [weight, still], "weight_decay": 0.1}, {"params": [gain]}], lr=0.0)
    buffers = [torch.zeros_like(p) for p in start]
    for step in range(3):
        gradients = [torch.randn(p.shape) for p in (weight, gain, still)]
        for group in optimizer.param_groups:
            group["lr"] = 0.5 + step
        for p, g in zip((weight, gain, still), gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for i in range(3):
            g = gradients[i].double()
            if start[i].ndim > 1:
                g = g + 0.1 * start[i]
                g = g * (0.001 * start[i].norm() / g.norm() if start[i].norm() > 0 else 1.0)
            buffers[i] = 0.9 * buffers[i] + g
            start[i] = start[i] - (0.5 + step) * buffers[i]
        for p, expected in zip((weight, gain, still), start, strict=True):
            torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_lars_skips_a_step_that_is_not_finite():
    weight, gain = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))
    optimizer = LARS([weight, gain], lr=0.1)
    for p in (weight, gain):
        p.grad = torch.ones_like(p)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    before = (
        [p.detach().clone() for p in (weight, gain)],
        [s["momentum_buffer"].clone() for s in optimizer.state.values()],
    )
    assert (before[0][0] < 1).all()
    weight.grad[0, 0], gain.grad[1] = torch.nan, torch.inf
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for p, b in zip((weight, gain), before[0], strict=True):
        assert torch.equal(p.detach(), b)
    for s, b in zip(optimizer.state.values(), before[1], strict=True):
        assert torch.equal(s["momentum_buffer"], b)
