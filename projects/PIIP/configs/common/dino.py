"""DINO on a PIIP backbone, as published: 900 queries, four levels, contrastive denoising.

DINO learns from boxes alone: set `dataloader.train.mapper.use_instance_mask = False` beside it.
"""

from detectron2.config import LazyCall as L

from piip.lazy import lazy_dataclass
from piip.modeling import PIIPBackbone
from piip.modeling.dino import DINO, ContrastiveDenoising, DINOCriterion, DINOTransformer, HungarianMatcher
from piip_core import zoo

model = L(DINO)(
    # No FPN. Every row of ../COCO replaces `config` by its own
    backbone=L(PIIPBackbone)(
        config=lazy_dataclass(zoo.get("piip_sbl_1792_1120_672_dino").config),
        pad_divisor=224,
        pretrained="${train.load_pretrained}",
        use_act_checkpoint=False,
    ),
    in_features=["res3", "res4", "res5"],  # strides 8, 16, 32; the neck adds stride 64
    num_groups=32,  # of the neck's norms
    transformer=L(DINOTransformer)(
        embed_dim=256,
        num_heads=8,
        num_points=4,
        ffn_dim=2048,
        num_encoder_layers=6,
        num_decoder_layers=6,
        num_levels=4,  # in_features and one more
        num_queries=900,  # images need as many cells: 900 are those of 208 x 208 pixels
        use_act_checkpoint="${..backbone.use_act_checkpoint}",  # the encoder's layers, too
    ),
    criterion=L(DINOCriterion)(
        # The class costs twice what its loss weighs, as in DETR
        matcher=L(HungarianMatcher)(class_weight=2.0, box_weight=5.0, giou_weight=2.0),
        class_weight=1.0,
        box_weight=5.0,
        giou_weight=2.0,
    ),
    denoising=L(ContrastiveDenoising)(
        num_denoising=100,  # positives per image, and as many negatives; more only where an image has more boxes
        label_noise=0.5,  # a quarter of the labels is drawn anew
        box_noise=1.0,  # the original DINO has 0.4
    ),
    num_classes="${data.num_classes}",
    max_detections=300,
    # DeiT branches were trained with mean = std = 127.5 in RGB order; rows with others say so
    pixel_mean=[127.5, 127.5, 127.5],
    pixel_std=[127.5, 127.5, 127.5],
    input_format="RGB",
)
