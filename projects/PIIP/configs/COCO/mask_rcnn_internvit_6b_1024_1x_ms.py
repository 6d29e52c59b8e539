"""InternViT-6B 1024, Mask R-CNN 1x with multi-scale training on COCO: published box AP 53.8, mask AP 48.1.

InternViT-6B at 1024 pixels.
"""

from piip.rows import apply_row
from piip_core import zoo

from ..common.coco_ms import data, dataloader
from ..common.mask_rcnn import model
from ..common.schedule_1x import lr_multiplier, optimizer, train

# Crops of 1024 pixels; test images fit into 1333 x 800, sides padded to multiples of 64
apply_row(
    zoo.get("internvit_6b_1024"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
