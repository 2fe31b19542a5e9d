"""A custom recipe: one wide view, four narrow views, and the patches of the wide view that the narrow views show.

    python examples/own_recipe.py SHARDS

SHARDS: a folder of WebDataset tars. Prints what a batch holds, and the share of narrow patches inside the wide view.
"""

import sys

from pipeline import Augmentation, Cut, Loader, Recipe, patch_targets

COLOUR = (Augmentation(jitter=0.8, gray=0.2, blur=0.5),)
WIDE = Cut("wide", count=1, size=224, grid=14, scale=(0.5, 1.0), augmentations=COLOUR)
NARROW = Cut("narrow", count=4, size=96, grid=6, scale=(0.05, 0.25), augmentations=COLOUR)


def targets(windows):
    """For each patch of the narrow views, the index of the wide view's patch that it shows, or -1: i32 (B, 4, 36).

    The loader calls this on the host while the batch is decoded. `windows` maps each kind of view to f32 (B, V, 4).
    """
    wide, narrow = windows["wide"][:, 0], windows["narrow"]
    return {"patches": patch_targets(wide, narrow, reference_grid=14, query_grid=6, query_size=96, rule="overlap")}


def main(shards: str) -> float:
    recipe = Recipe("own", "paper", (WIDE, NARROW), targets)
    batch = next(iter(Loader(shards, recipe, batch_size=8)))
    inside = (batch.targets["patches"] >= 0).float().mean().item()
    print(batch)
    print(f"{inside:.0%} of the narrow views' patches lie in the wide view")
    return inside


if __name__ == "__main__":
    main(sys.argv[1])
