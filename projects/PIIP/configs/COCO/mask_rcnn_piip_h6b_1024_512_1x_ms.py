"""PIIP-H6B 1024/512, Mask R-CNN 1x with multi-scale training on COCO: published box AP 55.8, mask AP 49.0.

Branch 1 InternViT-6B at 512, Branch 2 ViT-H at 1024.
"""

from piip.rows import apply_row
from piip_core import zoo

from ..common.coco_ms import data, dataloader
from ..common.mask_rcnn import model
from ..common.schedule_1x import lr_multiplier, optimizer, train

# Crops of 1024 pixels; test images fit into 1333 x 800, sides padded to multiples of 64
apply_row(
    zoo.get("piip_h6b_1024_512"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
