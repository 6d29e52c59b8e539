"""Mask R-CNN on a PIIP backbone, as published: Detectron2's heads on an FPN, everything in RGB."""

from detectron2.config import LazyCall as L

from piip.lazy import lazy_dataclass
from piip.modeling import PIIPFPN, PIIPBackbone, published_mask_rcnn
from piip_core import zoo

model = published_mask_rcnn()

# Every row of ../COCO replaces `config` by its own
model.backbone = L(PIIPFPN)(
    bottom_up=L(PIIPBackbone)(
        config=lazy_dataclass(zoo.get("piip_tsb_1568_1120_672").config),
        pad_divisor=224,
        pretrained="${train.load_pretrained}",
        use_act_checkpoint=False,
    ),
    in_features=["res2", "res3", "res4", "res5"],
    out_channels=256,
    top_block=model.backbone.top_block,
)

model.proposal_generator.pad_divisor = "${..backbone.bottom_up.pad_divisor}"
model.roi_heads.num_classes = "${data.num_classes}"

# DeiT branches were trained with mean = std = 127.5 in RGB order, not with ImageNet's statistics
model.pixel_mean = [127.5, 127.5, 127.5]
model.pixel_std = [127.5, 127.5, 127.5]
model.input_format = "RGB"
