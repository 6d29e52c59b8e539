"""PIIP pe_spatial:s,b,l 1568/1120/672: Mask R-CNN 1x on COCO.

Licence of the pretrained weights: apache-2.0.
"""

from piip.recipes import detector

# As PE's authors trained Mask R-CNN (facebookresearch/perception_models,
# apps/detection/projects/ViTDet/configs/COCO/mask_rcnn_PEspatial_G_coco36ep.py), in a third of the time
model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "mask_rcnn_piip_pe_spatial_sbl_1568_1120_672_1x",
    batch_size=64,
    lr=5e-5,
    layer_decay=0.9,
)
