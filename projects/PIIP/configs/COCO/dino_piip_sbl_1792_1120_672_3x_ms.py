"""PIIP-SBL 1792/1120/672, DINO 3x with multi-scale training on COCO: published box AP 57.8.

Branch 1 ViT-L at 672, Branch 2 ViT-B at 1120, Branch 3 ViT-S at 1792; DeiT III weights of 384 pixels.
"""

from piip.rows import apply_row
from piip_core import zoo

from ..common.coco_ms import data, dataloader
from ..common.dino import model
from ..common.schedule_1x import lr_multiplier, optimizer, train

dataloader.train.mapper.use_instance_mask = False  # boxes alone

# Crops of 1792 pixels; test images fit into 2332 x 1400, sides padded to multiples of 224
# 36 epochs of 117266 / 32 = 3665 iterations
apply_row(
    zoo.get("piip_sbl_1792_1120_672_dino"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
