"""Cascade Mask R-CNN on a PIIP backbone by the published rules; everything but the heads is that of mask_rcnn.py."""

from piip.modeling import published_cascade_mask_rcnn

from .mask_rcnn import model as _mask_rcnn

model = published_cascade_mask_rcnn()
model.backbone = _mask_rcnn.backbone
model.proposal_generator.pad_divisor = "${..backbone.bottom_up.pad_divisor}"
model.roi_heads.num_classes = "${data.num_classes}"
model.pixel_mean = _mask_rcnn.pixel_mean
model.pixel_std = _mask_rcnn.pixel_std
model.input_format = _mask_rcnn.input_format
