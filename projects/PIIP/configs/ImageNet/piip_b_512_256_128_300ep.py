"""PIIP-B 512/256/128, windows of 16 in Branch 3: from scratch on ImageNet-1K."""

from piip.recipes import classifier

model, data, dataloader, optimizer, lr_multiplier, train = classifier(
    "piip_b_512_256_128",
    from_scratch=True,
    batch_size=2048,
    lr=3e-3,
    weight_decay=0.05,
    epochs=300,
    warmup_epochs=5,
    ema_decay=None,
)
