"""PIIP-SBL 1120/672/448, windows of 28: Mask R-CNN 1x on COCO."""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector("piip_sbl_1120_672_448")
