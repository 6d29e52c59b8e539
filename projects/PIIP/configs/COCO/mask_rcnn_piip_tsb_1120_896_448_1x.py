"""PIIP-TSB 1120/896/448, Mask R-CNN 1x on COCO: published box AP 43.6, mask AP 38.7.

Branch 1 ViT-B at 448, Branch 2 ViT-S at 896, Branch 3 ViT-T at 1120.
"""

from piip.rows import apply_row
from piip_core import zoo

from ..common.coco import data, dataloader
from ..common.mask_rcnn import model
from ..common.schedule_1x import lr_multiplier, optimizer, train

# Images fit into 1120 x 672, sides padded to multiples of 224
apply_row(
    zoo.get("piip_tsb_1120_896_448"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
