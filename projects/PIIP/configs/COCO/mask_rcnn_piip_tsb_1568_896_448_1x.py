"""PIIP-TSB 1568/896/448, windows of 14: Mask R-CNN 1x on COCO."""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector("piip_tsb_1568_896_448")
