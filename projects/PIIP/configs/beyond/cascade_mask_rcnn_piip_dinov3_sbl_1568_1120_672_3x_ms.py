"""PIIP dinov3:s,b,l 1568/1120/672: Cascade R-CNN 3x with multi-scale training on COCO.

Licence of the pretrained weights: dinov3-license.
"""

from piip.recipes import detector

# The published pyramids' rate, and the decay of EVA-02's detectors (baaivision/EVA,
# EVA-02/det/projects/ViTDet/configs/eva2_mim_to_coco/eva2_coco_cascade_mask_rcnn_vitdet_l_4attn_1024_lrd0p8.py)
model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "cascade_mask_rcnn_piip_dinov3_sbl_1568_1120_672_3x_ms",
    crop=1568,
    layer_decay=0.8,
    epochs=36,
    lr_drops=(27, 33),
)
