"""PIIP-TSBL 1792/1568/1120/448, Mask R-CNN 1x on COCO: published box AP 49.4, mask AP 44.1.

Branch 1 ViT-L at 448, Branch 2 ViT-B at 1120, Branch 3 ViT-S at 1568, Branch 4 ViT-T at 1792.
"""

from piip.rows import apply_row
from piip_core import zoo

from ..common.coco import data, dataloader
from ..common.mask_rcnn import model
from ..common.schedule_1x import lr_multiplier, optimizer, train

# Images fit into 1792 x 1075, sides padded to multiples of 224
apply_row(
    zoo.get("piip_tsbl_1792_1568_1120_448"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
