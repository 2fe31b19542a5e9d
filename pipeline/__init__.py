"""The input pipeline: shards in, views with their windows and correspondences out.

The face of the package. Names are resolved on first use, so that importing it costs nothing before a command line is
parsed: numba, torch and DALI load when something of theirs is asked for.
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
