"""The parts of `tools/shard_imagenet.py`; what is not about ImageNet serves other sharders as well.

labels   class lists, the devkit's ground truth, Kaggle's csv files
sources  what lies in a folder or tar: one row per image, no content read
places   a source's folders and files, on this machine or at an address
plan     keys, order, subset, shards: everything that is decided before the first image
images   prove that an image decodes; repair or refuse it
samples  one shard of a plan as samples: read, examined, described
writer   samples as a USTAR file, its DALI index and its table
target   an OUT folder: paths, locks, what is made and what is missing, the metadata and the manifest
bucket   the same at an address in a bucket
pool     many shards over processes, with progress
check    is a finished folder what its manifest says?
command  options, the steps over a target, exit codes
"""


class SourceError(ValueError):
    """The source, the target or an option cannot be used; the message names the thing and the remedy."""


def printable(name: str) -> str:
    """A name with the bytes that are no UTF-8 written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()
