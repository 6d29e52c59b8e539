"""PIIP-SBL, DeiT III (S) + BEiTv2 (BL) 1568/1120/672, windows of 28: Mask R-CNN 1x on COCO."""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector("piip_sbl_beitv2_1568_1120_672")
