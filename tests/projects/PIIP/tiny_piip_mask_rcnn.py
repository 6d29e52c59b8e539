"""A Mask R-CNN on a PIIP of two small ViTs, with the settings of large models. A LazyConfig."""

import torch
from detectron2.config import LazyCall as L

from piip.lazy import lazy_dataclass
from piip.modeling import PIIPFPN, PIIPBackbone
from piip.solver import layer_decay_params
from piip_core import BranchConfig, InteractionConfig, MergingConfig, PIIPConfig, ViTConfig

from .tiny_mask_rcnn import data, dataloader, lr_multiplier, model, train  # noqa: F401

_networks = [ViTConfig(embed_dim=dim, depth=2, num_heads=2, pos_grid=4) for dim in (32, 16)]
_config = PIIPConfig(
    branches=tuple(BranchConfig(network=n, image_size=s) for n, s in zip(_networks, (64, 128), strict=True)),
    interaction=InteractionConfig(num_interactions=2, num_heads=4, drop_path_rate=0.1),
    # A norm of single channels would take away the bias before it: AdamW makes steps of the rounding of such gradients
    merging=MergingConfig(num_groups=8),
)
model.backbone._target_ = PIIPFPN
model.backbone.in_features = ["res2", "res3", "res4", "res5"]
model.backbone.bottom_up = L(PIIPBackbone)(
    config=lazy_dataclass(_config), pad_divisor=32, pretrained=False, use_act_checkpoint=True
)

train.clip_norm = 1.0

optimizer = L(torch.optim.AdamW)(
    params=L(layer_decay_params)(base_lr="${..lr}", weight_decay="${..weight_decay}", decay_rate=0.85),
    lr=1e-3,
    weight_decay=0.05,
)
