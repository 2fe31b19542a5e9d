"""Semantic segmentation with a frozen backbone: what `python -m trainer.segment` is made of.

    labelled   images with label maps            features   a backbone's patch features of them, cached
    metric     scores -> label maps -> mIoU      probes     k-NN, logistic regression, floors
    pictures   image, truth, prediction, error side by side        presence   which classes are in an image
    frozen     the backbone, from a run, timm or a released file   monitor    mIoU of k-NN while a run trains
    sliding    a trained head or network on whole images, through windows

Letters: P patches of all images one after another, D channels of a feature, C classes, H and W of a label map.
"""
