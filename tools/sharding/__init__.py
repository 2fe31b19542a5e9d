"""The rooms of `tools/shard_imagenet.py`.

tars     read any tar by offsets, write USTAR and its DALI index
images   prove that an image decodes; repair or refuse it
labels   class lists, the devkit's ground truth, Kaggle's csv files
sources  what lies in a folder or tar: one row per image, no payload read
plan     keys, order, subset, shards: everything that is decided before the first image
writing  one shard and its record; the lock; the spool of a gzipped source
pool     many shards over processes, with progress
finishing  the split's metadata; what lies in a target already
check    is a finished folder what its manifest says?
"""


class SourceError(ValueError):
    """The source, the target or an option cannot be used; the message names the thing and the remedy."""
