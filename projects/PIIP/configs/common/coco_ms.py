"""COCO-format data with the published multi-scale training; tests at one scale. See coco.py for everything else.

`data.train.crop` decides all sizes: at 1024, training images have short sides of 480 to 800 pixels.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from piip.data import MultiScaleCrop

from .coco import data, dataloader

data.train.crop = 1024
data.test.scales = [(1333, 800)]  # of crop 1024; for another crop set both, as every row does
del data.train.scales

dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(MultiScaleCrop)(crop="${data.train.crop}"),
]
