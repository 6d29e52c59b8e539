"""PIIP dinov3:s,b,l 1120/672/448: Mask R-CNN 1x on COCO.

Licence of the pretrained weights: dinov3-license.
"""

from piip.recipes import detector

# The published pyramids' rate, and the decay of EVA-02's detectors (baaivision/EVA,
# EVA-02/det/projects/ViTDet/configs/eva2_mim_to_coco/eva2_coco_cascade_mask_rcnn_vitdet_l_4attn_1024_lrd0p8.py)
model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "mask_rcnn_piip_dinov3_sbl_1120_672_448_1x",
    layer_decay=0.8,
)
