"""ViT-L 224, global attention: fine-tuned from AugReg on ImageNet-1K."""

from piip.recipes import classifier

model, data, dataloader, optimizer, lr_multiplier, train = classifier(
    "vit_l_224",
    batch_size=1024,
    lr=3e-5,
    weight_decay=0.1,
    epochs=20,
    warmup_epochs=5,
    ema_decay=0.99996,
)
