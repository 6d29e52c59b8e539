"""PIIP dinov3_convnext:t,dinov3:s,b 1024/672/448: Mask R-CNN 1x on COCO.

Licence of the pretrained weights: dinov3-license.
"""

from piip.recipes import detector

# Rate and decay of the published pyramids of ConvNeXts
model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "mask_rcnn_piip_dinov3_convnext_t_dinov3_sb_1024_672_448_1x",
    scale=(1333, 800),
    lr=2e-4,
    layer_decay=0.8,
)
