"""PIIP-SBL 1344/896/448, Mask R-CNN 1x on COCO: published box AP 48.3, mask AP 42.7.

Branch 1 ViT-L at 448, Branch 2 ViT-B at 896, Branch 3 ViT-S at 1344.
"""

from piip.rows import apply_row
from piip_core import zoo

from ..common.coco import data, dataloader
from ..common.mask_rcnn import model
from ..common.schedule_1x import lr_multiplier, optimizer, train

# Images fit into 1344 x 806, sides padded to multiples of 224
apply_row(
    zoo.get("piip_sbl_1344_896_448"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
