"""PIIP-SBL 1568/1120/672, Mask R-CNN 1x on COCO: published box AP 50.0, mask AP 44.4.

Branch 1 ViT-L at 672, Branch 2 ViT-B at 1120, Branch 3 ViT-S at 1568.
"""

from piip.rows import apply_row
from piip_core import zoo

from ..common.coco import data, dataloader
from ..common.mask_rcnn import model
from ..common.schedule_1x import lr_multiplier, optimizer, train

# Images fit into 1568 x 941, sides padded to multiples of 224
apply_row(
    zoo.get("piip_sbl_1568_1120_672"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
