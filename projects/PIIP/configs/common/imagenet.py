"""ImageNet-1K, or any folders of classes, with timm's image pipeline. `data` is what users override.

Own images, on the command line (a sub-folder per class; without a test folder, data.test.share=0.1 holds out a tenth):
    data.train.images=DIR data.test.images=DIR
"""

import os

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader
from omegaconf import OmegaConf
from timm.data import create_transform

from piip.data import build_train_loader
from piip.data.classification import ClassificationMapper, TopKEvaluator, get_test_dicts, get_train_dicts

_imagenet = os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), "imagenet")

data = OmegaConf.create(
    {
        "kind": "class_folders",  # a sub-folder of images per class
        "train": {
            "images": f"{_imagenet}/train",
            # The length of the training follows it. Follows data.train.images in our lazyconfig_train_net.py; with
            # Detectron2's, set it
            "num_images": 1_281_167,
        },
        "test": {
            "images": f"{_imagenet}/val",  # null: no evaluation
            # Part of the training images that is held out for the test; data.test.images is not read then
            "share": 0.0,
        },
        "image_size": 224,  # that of the model's largest branch
        # Follows data.train.images (data.test.images with --eval-only) in our lazyconfig_train_net.py; with
        # Detectron2's, set it. Models refer to it: num_classes="${data.num_classes}"
        "num_classes": 1000,
    }
)

dataloader = OmegaConf.create()

dataloader.train = L(build_train_loader)(
    dataset=L(get_train_dicts)(
        images="${data.train.images}", share="${data.test.share}", num_classes="${data.num_classes}"
    ),
    mapper=L(ClassificationMapper)(
        is_train=True,
        transform=L(create_transform)(
            input_size="${data.image_size}",
            is_training=True,
            use_prefetcher=True,  # 8 bits per channel; the model normalises and erases
            interpolation="bicubic",
            scale=(0.08, 1.0),
            ratio=(3 / 4, 4 / 3),
            hflip=0.5,
            auto_augment="rand-m9-mstd0.5-inc1",  # RandAugment; "3a" is DeiT III's 3-Augment
            color_jitter=0.3,  # not with RandAugment
        ),
        image_format="RGB",
        on_bad_image="error",  # or "skip": counted, with a warning
    ),
    total_batch_size=1024,
    aspect_ratio_grouping=False,  # the crops all have one size
    repeats=1,  # 3: DeiT's repeated augmentation
    num_workers=8,
    seed="${piip.checked:${oc.select:train.seed,0}}",  # see piip.setting_types
)

dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_test_dicts)(
        images="${data.test.images}",
        train_images="${data.train.images}",
        share="${data.test.share}",
        num_classes="${data.num_classes}",
    ),
    mapper=L(ClassificationMapper)(
        is_train=False,
        transform=L(create_transform)(
            input_size="${data.image_size}",
            is_training=False,
            use_prefetcher=True,
            interpolation="bicubic",
            crop_pct=1.0,  # the short side is resized to the input size
        ),
        image_format="${...train.mapper.image_format}",
    ),
    batch_size=64,
    num_workers=8,
)

dataloader.evaluator = L(TopKEvaluator)(topk=[1, 5], output_dir="${train.output_dir}/inference")
