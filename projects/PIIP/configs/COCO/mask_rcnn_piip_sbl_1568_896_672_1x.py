"""PIIP-SBL 1568/896/672, windows of 28: Mask R-CNN 1x on COCO."""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector("piip_sbl_1568_896_672")
