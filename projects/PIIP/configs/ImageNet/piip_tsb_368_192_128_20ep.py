"""PIIP-TSB 368/192/128, global attention: fine-tuned from DeiT on ImageNet-1K."""

from piip.recipes import classifier

model, data, dataloader, optimizer, lr_multiplier, train = classifier(
    "piip_tsb_368_192_128",
    batch_size=1024,
    lr=3e-5,
    interaction_lr_ratio=10.0,
    weight_decay=0.1,
    epochs=20,
    warmup_epochs=5,
    ema_decay=0.99996,
)
