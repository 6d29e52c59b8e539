"""PIIP dinov3:s,b,l 384/224/96: fine-tuned on ImageNet-1K.

Licence of the pretrained weights: dinov3-license.
"""

from piip.recipes import classifier
from piip_core import zoo

# As the published pyramids were fine-tuned from AugReg
model, data, dataloader, optimizer, lr_multiplier, train = classifier(
    zoo.beyond.classifier().config,
    batch_size=1024,
    lr=3e-5,
    interaction_lr_ratio=10.0,
    weight_decay=0.1,
    epochs=20,
    warmup_epochs=5,
    ema_decay=0.99996,
    output_dir="output/piip_dinov3_sbl_384_224_96_20ep",
)
