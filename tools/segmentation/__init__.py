"""The parts of `tools/shard_segmentation.py`; tars, target, pool and check are those of `sharding`.

classes     class lists, and the numbers and colours that stand for them
masks       a mask file -> class indices -> the PNG that is stored
pairs       what a layout is; which image and mask are a sample, which samples a split
layouts     the data sets, as their archives unpack
samples     one shard of a split as samples: image proven, mask converted
statistics  pixels of each class: counted when made, and again by --check
"""
