"""Semantic segmentation with a frozen backbone: the parts of `python -m trainer.segment`.

    labelled   images with label maps            features   a backbone's patch features of them, cached
    metric     scores -> label maps -> mIoU      probes     k-NN, logistic regression, floors
    pictures   image, truth, prediction, error side by side        presence   multi-label classification
    frozen     the backbone, from a run, timm or a released file   monitor    mIoU of k-NN during training
    sliding    a trained head or network on whole images, by sliding windows

Letters: P patches of all images one after another, D channels of a feature, C classes, H and W of a label map.
"""
