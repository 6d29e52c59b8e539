"""PIIP-SBL, AugReg (384), speed-up 1568/1120/672, windows of 28: Mask R-CNN 1x on COCO."""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector("piip_sbl_augreg384_speedup_1568_1120_672")
