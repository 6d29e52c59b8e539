"""PIIP-LH6B 1280/1024/640, Mask R-CNN 1x with multi-scale training on COCO: the paper's box AP 55.7, mask AP 49.0.

Branch 1 InternViT-6B at 640, Branch 2 ViT-H at 1024, Branch 3 ViT-L at 1280.
"""

from piip.rows import apply_row
from piip_core import zoo

from ..common.coco_ms import data, dataloader
from ..common.mask_rcnn import model
from ..common.schedule_1x import lr_multiplier, optimizer, train

# Crops of 1280 pixels; test images fit into 1666 x 1000, sides padded to multiples of 64
apply_row(
    zoo.get("piip_lh6b_1280_1024_640"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
