"""What `tools/shard_segmentation.py` knows about labelled images.

layouts  where each data set keeps its images and masks, which split they belong to, how masks are coded
classes  the class lists and the numbers or colours that stand for them
masks    a mask file -> class indices -> the PNG that is stored
"""
