"""PIIP-LH6B 1536/1024/512, DINO 2x with multi-scale training on COCO.

Branch 1: InternViT-6B at 512 pixels, global attention
Branch 2: ViT-H at 1024 pixels, global attention
Branch 3: ViT-L at 1536 pixels, global attention
"""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "piip_lh6b_1536_1024_512_dino",
    scale=(1999, 1200),
    crop=1536,
    batch_size=32,
    lr=2e-4,
    layer_decay=0.85,
    epochs=24,
    lr_drops=(16, 22),
)
