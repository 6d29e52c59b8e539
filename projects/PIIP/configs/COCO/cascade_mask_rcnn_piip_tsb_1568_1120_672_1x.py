"""PIIP-TSB 1568/1120/672, Cascade R-CNN 1x on COCO; no published numbers.

Branch 1 ViT-B at 672, Branch 2 ViT-S at 1120, Branch 3 ViT-T at 1568.
"""

from piip.rows import apply_row
from piip_core import zoo

from ..common.cascade_mask_rcnn import model
from ..common.coco import data, dataloader
from ..common.schedule_1x import lr_multiplier, optimizer, train

# Images fit into 1568 x 941, sides padded to multiples of 224
apply_row(
    zoo.get("piip_tsb_1568_1120_672_cascade_1x"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
