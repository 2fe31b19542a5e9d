"""The input pipeline: it reads shards and yields views with their windows and correspondences.

This module is the package's public interface. It imports each submodule on first use of one of its names. Importing
`pipeline` therefore does not load numba, torch or DALI, and command lines start quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import recipes as recipes
    from .batch import Batch as Batch
    from .batch import View as View
    from .correspondence import feature_locations as feature_locations
    from .correspondence import location_matches as location_matches
    from .correspondence import pair_matches as pair_matches
    from .correspondence import patch_targets as patch_targets
    from .host import cores as cores
    from .loader import Loader as Loader
    from .masks import decode_mask as decode_mask
    from .recipes import Augmentation as Augmentation
    from .recipes import Cut as Cut
    from .recipes import Recipe as Recipe
    from .shards import ReadError as ReadError
    from .shards import ShardError as ShardError
    from .shards import ShardSet as ShardSet
    from .streams import Stream as Stream

_MODULES = {
    "Augmentation": "recipes",
    "Batch": "batch",
    "Cut": "recipes",
    "Loader": "loader",
    "ReadError": "shards",
    "Recipe": "recipes",
    "ShardError": "shards",
    "ShardSet": "shards",
    "Stream": "streams",
    "View": "batch",
    "cores": "host",
    "decode_mask": "masks",
    "feature_locations": "correspondence",
    "location_matches": "correspondence",
    "pair_matches": "correspondence",
    "patch_targets": "correspondence",
}
__all__ = [*_MODULES, "recipes"]  # noqa: PLE0604 - strings, computed


def __getattr__(name: str) -> object:
    if name == "recipes":
        return import_module(".recipes", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
