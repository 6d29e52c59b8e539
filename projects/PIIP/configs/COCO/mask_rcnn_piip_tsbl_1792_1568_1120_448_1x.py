"""PIIP-TSBL 1792/1568/1120/448, windows of 28: Mask R-CNN 1x on COCO."""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector("piip_tsbl_1792_1568_1120_448")
