"""PIIP-LH6B 1536/1024/512, DINO 2x with multi-scale training on COCO; no score is published.

Branch 1 InternViT-6B at 512, Branch 2 ViT-H at 1024, Branch 3 ViT-L at 1536.
"""

from piip.rows import apply_row
from piip_core import zoo

from ..common.coco_ms import data, dataloader
from ..common.dino import model
from ..common.schedule_1x import lr_multiplier, optimizer, train

dataloader.train.mapper.use_instance_mask = False  # boxes alone

# Crops of 1536 pixels; test images fit into 1999 x 1200, sides padded to multiples of 64
# 24 epochs of 117266 / 32 = 3665 iterations
apply_row(
    zoo.get("piip_lh6b_1536_1024_512_dino"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
