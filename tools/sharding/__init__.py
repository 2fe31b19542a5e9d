"""The parts of `tools/shard_imagenet.py`; `tools/shard_segmentation.py` uses those that are not about ImageNet.

labels   class lists, the devkit's ground truth, Kaggle's csv files
sources  lists a folder or tar: one row per image, no content read
places   a source's folders and files, on this machine or at an address
plan     keys, order, subset, shards: everything that is decided before the first image is read
images   verifies that an image decodes; repairs or refuses it
samples  one shard of a plan as samples: read, examined, described
writer   samples as a USTAR file, its DALI index and its table
target   an OUT folder: paths, locks, finished and missing shards, the metadata and the manifest
bucket   a target in a bucket
pool     makes shards in several processes, with progress
check    compares a finished folder with its manifest
command  options, the steps over a target, exit codes
"""


class SourceError(ValueError):
    """The source, the target or an option cannot be used; the message names the thing and the remedy."""


def printable(name: str) -> str:
    """Return a name with escapes for bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
