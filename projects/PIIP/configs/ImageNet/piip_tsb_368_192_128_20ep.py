"""PIIP-TSB 368/192/128, fine-tuned from DeiT on ImageNet-1K: published top-1 82.1.

Branch 1 ViT-B at 128, Branch 2 ViT-S at 192, Branch 3 ViT-T at 368.
"""

from piip.rows import apply_classification_row
from piip_core import zoo

from ..common.classifier import model
from ..common.imagenet import data, dataloader
from ..common.schedule_20ep import lr_multiplier, optimizer, train

# 20 epochs of 1024 images per iteration
apply_classification_row(
    zoo.classification("piip_tsb_368_192_128"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
