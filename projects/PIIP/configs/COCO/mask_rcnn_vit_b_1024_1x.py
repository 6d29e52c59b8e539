"""ViT-B 1024, Mask R-CNN 1x on COCO: published box AP 43.7, mask AP 39.7.

ViT-B at 1024 pixels.
"""

from piip.rows import apply_row
from piip_core import zoo

from ..common.coco import data, dataloader
from ..common.mask_rcnn import model
from ..common.schedule_1x import lr_multiplier, optimizer, train

# Images fit into 1024 x 614, sides padded to multiples of 64
apply_row(
    zoo.get("vit_b_1024"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
