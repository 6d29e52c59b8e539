"""PIIP-TSB 1568/1120/672, Cascade R-CNN 3x with multi-scale training on COCO: the paper's box AP 53.1, mask AP 46.5.

Branch 1 ViT-B at 672, Branch 2 ViT-S at 1120, Branch 3 ViT-T at 1568.
"""

from piip.rows import apply_row
from piip_core import zoo

from ..common.cascade_mask_rcnn import model
from ..common.coco_ms import data, dataloader
from ..common.schedule_3x import lr_multiplier, optimizer, train

# Crops of 1568 pixels; test images fit into 2041 x 1225, sides padded to multiples of 224
# 36 epochs of 117266 / 16 = 7330 iterations
apply_row(
    zoo.get("piip_tsb_1568_1120_672_cascade_3x_ms"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
