"""ADE20K, or any folders of images and label maps, with the published image pipeline. `data` is what users override.

Own data, on the command line (label maps: PNG files named as the images, 0 to N - 1, 255 to ignore):
    data.train.images=DIR data.train.labels=DIR data.test.images=DIR data.test.labels=DIR data.classes=names.txt
"""

import math
import os

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader
from omegaconf import OmegaConf

from piip.data import KeepRatioResize, PhotometricDistortion, build_train_loader
from piip.data.label_maps import IGNORE_LABEL
from piip.data.segmentation import SemSegDatasetMapper, build_sem_seg_evaluator, get_sem_seg_dicts

_ade20k = os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), "ADEChallengeData2016")

data = OmegaConf.create(
    {
        "kind": "label_maps",
        "train": {
            "images": f"{_ade20k}/images/training",
            "labels": f"{_ade20k}/annotations/training",
            # (long side, short side) that the image just fits into, times a random ratio; then a random crop
            "scale": (2048, 512),
            "ratio_range": (0.5, 2.0),
            "crop": (512, 512),
        },
        "test": {
            "images": f"{_ade20k}/images/validation",
            "labels": f"{_ade20k}/annotations/validation",  # null: no evaluation
            "short_side": 512,  # the long side is not limited
        },
        # "ade20k", a text file with one name per line, a list of names, or the number of classes
        "classes": "ade20k",
        # Whether 0 in the files means "ignore" and class k is k + 1. null: as in the data set's own files, which is
        # True for "ade20k" and False for all others; False for ADE20K in the layout that Detectron2 converts it to
        "reduce_zero_label": None,
        # Follows data.classes in our lazyconfig_train_net.py; with Detectron2's, set it. Models refer to it:
        # num_classes="${data.num_classes}"
        "num_classes": 150,
    }
)

_classes = {"classes": "${data.classes}", "reduce_zero_label": "${data.reduce_zero_label}"}

dataloader = OmegaConf.create()

dataloader.train = L(build_train_loader)(
    dataset=L(get_sem_seg_dicts)(
        images="${data.train.images}",
        labels="${data.train.labels}",
        num_classes="${data.num_classes}",
        **_classes,
    ),
    mapper=L(SemSegDatasetMapper)(
        is_train=True,
        augmentations=[
            L(KeepRatioResize)(scales=["${data.train.scale}"], ratio_range="${data.train.ratio_range}"),
            L(T.RandomCrop_CategoryAreaConstraint)(
                crop_type="absolute",
                crop_size="${data.train.crop}",
                single_category_max_area=0.75,
                ignored_category=IGNORE_LABEL,
            ),
            L(T.RandomFlip)(horizontal=True),
            L(PhotometricDistortion)(),
        ],
        image_format="RGB",
        on_bad_image="error",  # or "skip": counted, with a warning
        **_classes,
    ),
    total_batch_size=16,
    aspect_ratio_grouping=False,  # the crops all have one size
    num_workers=4,
    seed="${piip.checked:${oc.select:train.seed,0}}",  # see piip.setting_types
)

dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_sem_seg_dicts)(
        images="${data.test.images}",
        labels="${data.test.labels}",
        num_classes="${data.num_classes}",
        **_classes,
    ),
    mapper=L(SemSegDatasetMapper)(
        is_train=False,
        augmentations=[L(KeepRatioResize)(scales=[(math.inf, "${data.test.short_side}")])],
        image_format="${...train.mapper.image_format}",
        **_classes,
    ),
    num_workers=4,
)

dataloader.evaluator = L(build_sem_seg_evaluator)(
    images="${data.test.images}",
    labels="${data.test.labels}",
    output_dir="${train.output_dir}/inference",
    **_classes,
)
