"""PIIP dinov3:s,b,l, frozen 1120/448/336: UperNet 160k on ADE20K.

Licence of the pretrained weights: dinov3-license.
"""

from piip.recipes import segmentor

# DINOv3's own linear heads on frozen networks learn at 1e-3 (facebookresearch/dinov3,
# dinov3/eval/segmentation/configs/config-ade20k-linear-training.yaml), published pyramids with UperNet at 4e-5
model, data, dataloader, optimizer, lr_multiplier, train = segmentor(
    "upernet_piip_dinov3_sbl_1120_448_336_frozen_160k",
    crop=1120,
    lr=2e-4,
    layer_decay=0.95,
    max_iter=160_000,
)
