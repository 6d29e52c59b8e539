"""A classifier with class tokens on a PIIP of two small ViTs, for folders of classes. A LazyConfig."""

from detectron2.config import LazyCall as L
from timm.data.random_erasing import RandomErasing

from piip.recipes import classifier
from piip_core import BranchConfig, ClassifierConfig, InteractionConfig, PIIPConfig, ViTConfig

_networks = [
    ViTConfig(embed_dim=dim, depth=2, num_heads=2, pos_grid=grid, class_token=True) for dim, grid in ((32, 1), (16, 2))
]
model, data, dataloader, optimizer, lr_multiplier, train = classifier(
    ClassifierConfig(
        pyramid=PIIPConfig(
            branches=tuple(BranchConfig(network=n, image_size=s) for n, s in zip(_networks, (16, 32), strict=True)),
            interaction=InteractionConfig(num_interactions=2, num_heads=4, drop_path_rate=0.1),
            merging=None,
        )
    ),
    batch_size=4,
    lr=1e-3,
    interaction_lr_ratio=10.0,
    weight_decay=0.1,
    epochs=1.5,  # of three iterations, on twelve images
    warmup_epochs=0.5,
    ema_decay=0.5,
    output_dir="output/tiny",
)
model.random_erasing = L(RandomErasing)(probability=0.5, mode="pixel", device="${train.device}")

dataloader.train.num_workers = dataloader.test.num_workers = 0
dataloader.test.batch_size = 3

lr_multiplier.warmup_lr = 1e-4

train.device = "cpu"
train.amp.enabled = False
train.eval_period = 0
train.checkpointer.period = 2
train.log_period = 2
train.load_pretrained = False
