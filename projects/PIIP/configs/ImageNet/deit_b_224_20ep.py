"""DeiT-B 224, global attention: fine-tuned from DeiT on ImageNet-1K."""

from piip.recipes import classifier

model, data, dataloader, optimizer, lr_multiplier, train = classifier(
    "deit_b_224",
    batch_size=1024,
    lr=3e-5,
    weight_decay=0.1,
    epochs=20,
    warmup_epochs=5,
    ema_decay=0.99996,
)
