"""PIIP-SBL 1792/1120/672, windows of 24, every third block global: DINO 3x with multi-scale training on COCO."""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "piip_sbl_1792_1120_672_dino",
    crop=1792,
    batch_size=32,
    lr=2e-4,
    epochs=36,
    lr_drops=(27, 33),
)
