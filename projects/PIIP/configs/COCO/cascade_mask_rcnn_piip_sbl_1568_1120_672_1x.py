"""PIIP-SBL 1568/1120/672, windows of 28: Cascade R-CNN 1x on COCO."""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector("piip_sbl_1568_1120_672_cascade_1x")
