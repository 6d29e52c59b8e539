"""PIIP-H6B 1024/768, DINO 1x with multi-scale training on COCO: published box AP 60.0.

Branch 1 InternViT-6B at 768, Branch 2 ViT-H at 1024.
"""

from piip.rows import apply_row
from piip_core import zoo

from ..common.coco_ms import data, dataloader
from ..common.dino import model
from ..common.schedule_1x import lr_multiplier, optimizer, train

dataloader.train.mapper.use_instance_mask = False  # boxes alone

# Crops of 1024 pixels; test images fit into 1333 x 800, sides padded to multiples of 64
# 12 epochs of 117266 / 32 = 3665 iterations
apply_row(
    zoo.get("piip_h6b_1024_768_dino"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
