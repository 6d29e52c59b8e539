"""PIIP-SBL 1120/448/336, UperNet 160k on ADE20K: the paper's mIoU 54.3.

Branch 1 ViT-L at 336, Branch 2 ViT-B at 448, Branch 3 ViT-S at 1120.
"""

from piip.rows import apply_row
from piip_core import zoo

from ..common.ade20k import data, dataloader
from ..common.schedule_80k import lr_multiplier, optimizer, train
from ..common.upernet import model

# Crops and windows of 1120 pixels, windows every 746; 160000 iterations of 16 images
apply_row(
    zoo.get("piip_sbl_1120_448_336_upernet"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
