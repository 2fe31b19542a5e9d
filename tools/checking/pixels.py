"""Checks that the views equal the CPU's, and that they stay valid while they are held."""

from contextlib import nullcontext

import torch

from pipeline import recipes
from pipeline.graph import Form

from .bench import RECIPES, Bench

PIXEL_MEAN, PIXEL_SHARE = 1.5, 0.02  # levels of mean difference; share of pixels that may differ by more than 16 levels


def windows_are_equal_and_pixels_close(bench: Bench) -> None:
    """Check each form against the CPU: the same samples, windows bit for bit, pixels within the tolerance."""
    apart = []
    for name, make in RECIPES.items():
        for form in bench.forms:
            host, device = bench.loader(make(), "cpu", seed=3), bench.loader(make(), seed=3, form=form)
            found: dict[str, dict[str, float]] = {}
            for a, b, _ in zip(host, device, range(2), strict=False):
                assert torch.equal(a.index, b.index), f"{name}, {form}: different samples on the GPU"
                for kind, view in a.views.items():
                    assert torch.equal(view.window, b.views[kind].window.cpu()), (
                        f"{name}/{kind}, {form}: windows differ"
                    )
                    difference = (view.pixels.int() - b.views[kind].pixels.cpu().int()).abs().float()
                    worst = found.setdefault(kind, {"mean_levels": 0.0, "share_over_16": 0.0})
                    worst["mean_levels"] = max(worst["mean_levels"], difference.mean().item())
                    worst["share_over_16"] = max(worst["share_over_16"], (difference > 16).float().mean().item())
                for target, values in a.targets.items():
                    assert torch.equal(values, b.targets[target].cpu()), f"{name}, {form}: targets of {target} differ"
            device.close()
            for kind, worst in found.items():
                bench.note(f"{name}/{kind} {form}", worst)
                if worst["mean_levels"] > PIXEL_MEAN or worst["share_over_16"] > PIXEL_SHARE:
                    apart.append(f"{name}/{kind} {form}")
    assert not apart, f"pixels differ by more than {PIXEL_MEAN} levels, or too many by 16: {', '.join(apart)}"


def outputs_stay_valid(bench: Bench) -> None:
    """Check in each form that DALI keeps its memory (views, decoded images) while it is held or the device reads it."""

    def sums(form: Form, late: bool) -> list[int]:
        loader, found = bench.loader(recipes.plain(), form=form), []
        with torch.cuda.stream(torch.cuda.Stream()) if late and bench.gpu else nullcontext():
            for batch, _ in zip(loader.forever(), range(24), strict=False):
                if late and bench.gpu:
                    torch.cuda._sleep(20_000_000)  # the batch is released about 10 ms before it is read
                found.append(batch.views["image"].pixels.sum(dtype=torch.int64))
                if not late:
                    bench.synchronize()
        bench.synchronize()
        loader.close()
        return [int(total) for total in found]

    for form in bench.forms:
        loader = bench.loader(recipes.plain(), form=form)
        images = (batch.views["image"].pixels for batch in loader.forever())
        held = [(pixels, pixels.clone()) for pixels, _ in zip(images, range(8), strict=False)]
        bench.synchronize()
        loader.close()
        assert all(torch.equal(a, b) for a, b in held), f"{form}: a held batch was overwritten"
        assert sums(form, True) == sums(form, False), f"{form}: a batch was overwritten before the device had read it"
        bench.note(form, {"batches_held": len(held), "batches_read_late": 24})
