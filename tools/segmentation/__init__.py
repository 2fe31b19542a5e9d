"""The parts of `tools/shard_segmentation.py`; `sharding` provides tars, target, pool and check.

classes     class lists, and their numbers and colours in masks
masks       a mask file -> class indices -> the PNG that is stored
pairs       layouts; the pairs of image and mask that make up a split
layouts     the data sets, as their archives unpack
samples     one shard of a split as samples: image verified, mask converted
statistics  pixels of each class: counted when shards are made, and again by --check
"""
