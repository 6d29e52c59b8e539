"""UperNet on a PIIP backbone, as published for ADE20K: pyramid pooling and FPN head, auxiliary FCN head, in RGB."""

from detectron2.config import LazyCall as L

from piip.lazy import lazy_dataclass
from piip.modeling import FCNHead, PIIPBackbone, SlidingWindowSegmentor, UperNetHead, feature_shapes
from piip_core import zoo

_head = {
    "num_classes": "${data.num_classes}",
    "channels": 1536,
    "norm": "SyncBN",  # "naiveSyncBN" where several processes train on CPUs
    "dropout": 0.1,
    "ignore_value": 255,
    "loss_average": "all",  # divided by all pixels, ignored ones included; usual is "valid"
}

model = L(SlidingWindowSegmentor)(
    # Every row of ../ADE20K replaces `config` by its own. Heads take the maps as they are: no FPN between
    backbone=L(PIIPBackbone)(
        config=lazy_dataclass(zoo.get("piip_h6b_512_256_upernet").config),
        pad_divisor=32,  # windows and crops of 512 need no padding
        pretrained="${train.load_pretrained}",
        use_act_checkpoint=False,
    ),
    sem_seg_head=L(UperNetHead)(
        input_shape=L(feature_shapes)(config="${...backbone.config}", names=["res2", "res3", "res4", "res5"]),
        pool_scales=[1, 2, 3, 6],
        align_corners=False,
        loss_weight=1.0,
        **_head,
    ),
    auxiliary_head=L(FCNHead)(
        input_shape=L(feature_shapes)(config="${...backbone.config}", names=["res4"]),
        align_corners="${..sem_seg_head.align_corners}",
        loss_weight=0.4,
        **_head,
    ),
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    input_format="RGB",
    train_size=512,  # of the crops; smaller images are padded to it
    inference="slide",  # or "whole"
    window=512,
    stride=341,
    window_batch_size=1,
)
