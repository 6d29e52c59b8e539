"""PIIP-TSBL 1344/896/672/448, windows of 28: Mask R-CNN 1x on COCO."""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector("piip_tsbl_1344_896_672_448")
