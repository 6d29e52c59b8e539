"""PIIP-H6B 512/192, UperNet 80k on ADE20K: published mIoU 57.81.

Branch 1 InternViT-6B at 192, Branch 2 ViT-H at 512.
"""

from piip.rows import apply_row
from piip_core import zoo

from ..common.ade20k import data, dataloader
from ..common.schedule_80k import lr_multiplier, optimizer, train
from ..common.upernet import model

# Crops and windows of 512 pixels, windows every 341; 80000 iterations of 16 images
apply_row(
    zoo.get("piip_h6b_512_192_upernet"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
