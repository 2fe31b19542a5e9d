"""Frozen segmentation during a run: mIoU of k-NN on a few fixed images."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer import config
from trainer.backbones import ResNet, input_size
from trainer.segmentation.features import extract
from trainer.segmentation.frozen import Frozen
from trainer.segmentation.labelled import Labelled, class_names
from trainer.segmentation.metric import evaluate, label_map
from trainer.segmentation.pictures import panels
from trainer.segmentation.probes import Neighbours, scores

MEMORY = 50_000  # patches in the k-NN's memory; with so few, a score takes seconds


class Monitor:
    """mIoU of k-NN as in `trainer.segment`, at the image size of the run. It does not change the state of the run.

    The constructor raises ValueError for shards that cannot be read, list different classes or have no label maps.
    """

    def __init__(self, cfg: config.Probe, mean: tuple[float, ...], std: tuple[float, ...], device: str) -> None:
        self._sets = [Labelled(spec) for spec in (cfg.segment_train, cfg.segment_val) if spec]
        self._names = class_names(*self._sets)
        random = np.random.default_rng(0)
        self._images = [np.sort(random.permutation(len(data))[: cfg.segment_images]) for data in self._sets]
        for data, images in zip(self._sets, self._images, strict=True):
            data.mask(int(images[0]))
        self._mean, self._std, self._device = mean, std, device

    def __call__(self, backbone: Any) -> tuple[float, NDArray[np.uint8]]:
        """Return the mIoU in percent, and a picture u8 (H, W, 3) of one image, its labels, prediction and errors."""
        training = backbone.training
        side = input_size(backbone)
        network = backbone.dilated() if isinstance(backbone, ResNet) else backbone.eval()
        frozen = Frozen(network, self._mean, self._std)
        count = len(self._names)
        try:
            train, val = (
                extract(frozen, data, count, short_side=side, images=images)
                for data, images in zip(self._sets, self._images, strict=True)
            )
        finally:
            backbone.train(training)
        predict = scores(Neighbours(train, MEMORY, device=self._device), val, val.x)
        data, images = self._sets[1], self._images[1]
        miou = 100 * evaluate(data, images, {"knn": predict}, count, device=self._device)["knn"].miou
        i = int(images[0])
        truth = data.mask(i)
        picture = panels(data.image(i), truth, label_map(predict(0), *truth.shape).cpu(), self._names)
        return miou, np.asarray(picture)
