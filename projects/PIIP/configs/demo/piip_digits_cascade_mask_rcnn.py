"""Cascade Mask R-CNN on the digit scenes: the demo's backbone and head sizes, three stages."""

from piip.modeling import published_cascade_mask_rcnn

from .piip_digits_mask_rcnn import data, dataloader, lr_multiplier, model, optimizer, train

_published = published_cascade_mask_rcnn()
_small = model.roi_heads  # those of Mask R-CNN
model.roi_heads = _published.roi_heads
model.roi_heads.num_classes = "${data.num_classes}"
for _name in (
    "batch_size_per_image",
    "positive_fraction",
    "box_in_features",
    "box_pooler",
    "mask_in_features",
    "mask_pooler",
):
    model.roi_heads[_name] = _small[_name]
model.roi_heads.box_heads = [_small.box_head for _ in range(3)]
model.roi_heads.mask_heads = [_small.mask_head for _ in range(3)]
for _predictor in model.roi_heads.box_predictors:
    _predictor.input_shape = _small.box_predictor.input_shape

for _name in ("anchor_boundary_thresh", "smooth_l1_beta"):
    model.proposal_generator[_name] = _published.proposal_generator[_name]

train.output_dir = "output/demo/cascade"
