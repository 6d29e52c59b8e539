"""Mask R-CNN on the digit scenes with a hybrid pyramid: ConvNeXt at the largest image, ViTs at the smaller ones.

As in the published hybrids, every stage of the ConvNeXt ends with a merging that gives one level.
"""

from piip.lazy import lazy_dataclass
from piip_digits.model import hybrid_config

from .piip_digits_mask_rcnn import data, dataloader, lr_multiplier, model, optimizer, train

_FEATURES = ["p2", "p3", "p4", "p5"]
_STRIDES = [4, 8, 16, 32]

model.backbone.bottom_up.config = lazy_dataclass(hybrid_config())
model.backbone.bottom_up.pad_divisor = 32
model.backbone.in_features = ["res2", "res3", "res4", "res5"]

# One more level than the plain pyramid has
model.proposal_generator.in_features = _FEATURES
model.proposal_generator.anchor_generator.sizes = [[24], [48], [96], [192]]
model.proposal_generator.anchor_generator.strides = _STRIDES
model.roi_heads.box_in_features = _FEATURES
model.roi_heads.box_pooler.scales = [1 / stride for stride in _STRIDES]

train.output_dir = "output/demo/hybrid"
