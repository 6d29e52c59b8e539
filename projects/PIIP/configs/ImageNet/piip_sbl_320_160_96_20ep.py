"""PIIP-SBL 320/160/96, fine-tuned from AugReg on ImageNet-1K: published top-1 85.2.

Branch 1 ViT-L at 96, Branch 2 ViT-B at 160, Branch 3 ViT-S at 320.
"""

from piip.rows import apply_classification_row
from piip_core import zoo

from ..common.classifier import model
from ..common.imagenet import data, dataloader
from ..common.schedule_20ep import lr_multiplier, optimizer, train

# 20 epochs of 1024 images per iteration
apply_classification_row(
    zoo.classification("piip_sbl_320_160_96"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
