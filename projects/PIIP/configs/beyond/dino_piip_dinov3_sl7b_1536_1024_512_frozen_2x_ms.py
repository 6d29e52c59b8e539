"""PIIP dinov3:s,l,7b, frozen 1536/1024/512: DINO 2x with multi-scale training on COCO.

Licence of the pretrained weights: dinov3-license.
"""

from piip.recipes import detector

# The published pyramids' rate, for interactions, merging, pyramid and heads
model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "dino_piip_dinov3_sl7b_1536_1024_512_frozen_2x_ms",
    crop=1536,
    batch_size=32,
    lr=2e-4,
    epochs=24,
    lr_drops=(16, 22),
)

# 6.7 G parameters that nothing is kept for; of the activations only those between the blocks
model.backbone.use_act_checkpoint = True
