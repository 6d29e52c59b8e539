"""PIIP-CT-CS-VB 1024/672/448, Mask R-CNN 1x on COCO: published box AP 46.8, mask AP 42.2.

Branch 1 ViT-B at 448, Branch 2 ConvNeXt-S at 672, Branch 3 ConvNeXt-T at 1024.
"""

from piip.rows import apply_row
from piip_core import zoo

from ..common.coco import data, dataloader
from ..common.mask_rcnn import model
from ..common.schedule_1x import lr_multiplier, optimizer, train

# Images fit into 1333 x 800, sides padded to multiples of 32
apply_row(
    zoo.get("piip_ct_cs_vb_1024_672_448"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
