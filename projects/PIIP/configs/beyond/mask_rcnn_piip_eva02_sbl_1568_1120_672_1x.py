"""PIIP eva02:s,b,l 1568/1120/672: Mask R-CNN 1x on COCO.

Licence of the pretrained weights: mit.
"""

from piip.recipes import detector

# As EVA-02's authors trained Cascade R-CNN, with 144 images per iteration (baaivision/EVA,
# EVA-02/det/projects/ViTDet/configs/eva2_mim_to_coco/eva2_coco_cascade_mask_rcnn_vitdet_l_4attn_1024_lrd0p8.py)
model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "mask_rcnn_piip_eva02_sbl_1568_1120_672_1x",
    lr=6e-5,
    layer_decay=0.8,
)
