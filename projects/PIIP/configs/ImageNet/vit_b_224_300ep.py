"""ViT-B 224, global attention: from scratch on ImageNet-1K."""

from piip.recipes import classifier

model, data, dataloader, optimizer, lr_multiplier, train = classifier(
    "vit_b_224",
    from_scratch=True,
    batch_size=2048,
    lr=3e-3,
    weight_decay=0.05,
    epochs=300,
    warmup_epochs=5,
    ema_decay=None,
)
