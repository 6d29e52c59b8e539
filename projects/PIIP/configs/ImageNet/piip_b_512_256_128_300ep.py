"""PIIP-B 512/256/128, from scratch on ImageNet-1K: the paper's top-1 82.7.

Branch 1 of width 640 at 128, Branch 2 of 320 at 256, Branch 3 of 160 at 512.
"""

from piip.rows import apply_classification_row
from piip_core import zoo

from ..common.from_scratch import data, dataloader, lr_multiplier, model, optimizer, train

# 300 epochs of 2048 images per iteration
apply_classification_row(
    zoo.classification("piip_b_512_256_128"),
    model=model,
    data=data,
    dataloader=dataloader,
    optimizer=optimizer,
    lr_multiplier=lr_multiplier,
    train=train,
)
