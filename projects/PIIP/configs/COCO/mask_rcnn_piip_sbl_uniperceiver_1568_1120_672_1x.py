"""PIIP-SBL, DeiT III (S) + Uni-Perceiver (BL) 1568/1120/672, Mask R-CNN 1x on COCO.

Published box AP 48.8, mask AP 42.9.

Branch 1 Uni-Perceiver-L at 672, Branch 2 Uni-Perceiver-B at 1120, Branch 3 ViT-S at 1568.
"""

from piip.rows import apply_row
from piip_core import zoo

from ..common.coco import data, dataloader
from ..common.mask_rcnn import model
from ..common.schedule_1x import lr_multiplier, optimizer, train

# Images fit into 1568 x 941, sides padded to multiples of 224
apply_row(
    zoo.get("piip_sbl_uniperceiver_1568_1120_672"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
