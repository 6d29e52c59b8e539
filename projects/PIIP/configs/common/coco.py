"""COCO-format data with the published image pipeline. `data` is what users override; everything else refers to it.

Own data, on the command line:
    data.train.annotations=A.json data.train.images=DIR data.test.annotations=B.json data.test.images=DIR
"""

import os

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader
from omegaconf import OmegaConf

from piip.data import (
    CheckedDatasetMapper,
    KeepRatioResize,
    build_coco_evaluator,
    build_train_loader,
    get_coco_dicts,
)

_coco = os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), "coco")

data = OmegaConf.create(
    {
        "kind": "coco",  # annotation files in COCO's format
        "train": {
            "annotations": f"{_coco}/annotations/instances_train2017.json",
            "images": f"{_coco}/train2017",
            # (long side, short side) that the image just fits into; with several, one is drawn per image. Published
            # rule for a pyramid whose largest image is L: short side = floor(L * 800 / 1333)
            "scales": [(1568, 941)],
        },
        "test": {
            "annotations": f"{_coco}/annotations/instances_val2017.json",  # null: no evaluation
            "images": f"{_coco}/val2017",
            "scales": "${..train.scales}",
        },
        # Follows data.train.annotations (data.test.annotations with --eval-only) in our lazyconfig_train_net.py; with
        # Detectron2's, set it. Models refer to it: num_classes="${data.num_classes}"
        "num_classes": 80,
        # Class names for a checkpoint that holds none, when there is no annotation file either
        "names_from": "coco_2017_val",
    }
)

dataloader = OmegaConf.create()

dataloader.train = L(build_train_loader)(
    dataset=L(get_coco_dicts)(
        annotations="${data.train.annotations}",
        images="${data.train.images}",
        num_classes="${data.num_classes}",
        # The published training set: images with objects, at least 32 pixels wide and high
        filter_empty=True,
        min_image_side=32,
        drop_boxes=True,
        require_masks="${..mapper.use_instance_mask}",
    ),
    mapper=L(CheckedDatasetMapper)(
        is_train=True,
        augmentations=[
            L(KeepRatioResize)(scales="${data.train.scales}"),
            L(T.RandomFlip)(horizontal=True),
        ],
        image_format="RGB",  # Detectron2's default is BGR; the published models take RGB
        use_instance_mask=True,
        instance_mask_format="bitmask",  # mask targets are cropped from a raster, as published
        on_bad_image="error",  # or "skip": counted, with a warning
    ),
    total_batch_size=16,
    aspect_ratio_grouping=True,
    num_workers=4,
    seed="${piip.checked:${oc.select:train.seed,0}}",  # see piip.setting_types
)

dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_coco_dicts)(
        annotations="${data.test.annotations}",
        images="${data.test.images}",
        num_classes="${data.num_classes}",
        filter_empty=False,
        drop_boxes=False,
        require_masks="${...train.mapper.use_instance_mask}",
    ),
    mapper=L(CheckedDatasetMapper)(
        is_train=False,
        augmentations=[L(KeepRatioResize)(scales="${data.test.scales}")],
        image_format="${...train.mapper.image_format}",
    ),
    num_workers=4,
)

dataloader.evaluator = L(build_coco_evaluator)(
    annotations="${data.test.annotations}",
    output_dir="${train.output_dir}/inference",
    require_masks="${..train.mapper.use_instance_mask}",
)
