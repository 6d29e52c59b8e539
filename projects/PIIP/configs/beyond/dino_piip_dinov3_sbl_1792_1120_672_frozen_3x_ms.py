"""PIIP dinov3:s,b,l, frozen 1792/1120/672: DINO 3x with multi-scale training on COCO.

Licence of the pretrained weights: dinov3-license.
"""

from piip.recipes import detector

# The published pyramids' rate, for interactions, merging, pyramid and heads
model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "dino_piip_dinov3_sbl_1792_1120_672_frozen_3x_ms",
    crop=1792,
    batch_size=32,
    lr=2e-4,
    epochs=36,
    lr_drops=(27, 33),
)
