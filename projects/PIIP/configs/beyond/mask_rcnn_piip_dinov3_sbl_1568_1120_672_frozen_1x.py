"""PIIP dinov3:s,b,l, frozen 1568/1120/672: Mask R-CNN 1x on COCO.

Licence of the pretrained weights: dinov3-license.
"""

from piip.recipes import detector

# The published pyramids' rate, for interactions, merging, pyramid and heads
model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "mask_rcnn_piip_dinov3_sbl_1568_1120_672_frozen_1x",
)
