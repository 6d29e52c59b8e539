"""Training steps of detectors, segmentors and classifiers on tensors without data, for `piip_tools.memory`.

What a training step does with ground truth (matching, sampling, suppression) depends on values, which such tensors do
not have. Heads therefore run on as many samples as they take at most, and `squares` stands for losses that depend on
values.
"""

from __future__ import annotations

import torch
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import ImageList
from torch import Tensor, nn
from torchvision.ops import roi_align

from piip.modeling.classifier import ImageClassifier
from piip.modeling.dino import DINO
from piip.modeling.dino.denoising import DenoisingLayout, DenoisingQueries
from piip.modeling.segmentor import SlidingWindowSegmentor
from piip_core.classifier import PIIPClassifier

from .dry_run import Step, squares

_DENOISING_SLOTS = 200  # of an image with up to 100 objects


def size_divisor(model: nn.Module) -> int:
    """What the sides of padded images are multiples of; classifiers pad nothing."""
    return 1 if isinstance(model, ImageClassifier) else model.backbone.size_divisibility


def training_step(model: nn.Module, batch_size: int, size: tuple[int, int]) -> tuple[Step, list[str]]:
    """A training step for `DryRun` and notes on what it leaves out.

    Args:
        model: A detector, segmentor or classifier.
        batch_size: Images.
        size: Height and width of the padded images.
    """
    shape = (batch_size, 3, *size)
    if isinstance(model, ImageClassifier):
        return lambda model: squares([PIIPClassifier.forward(model, torch.empty(shape))]), []
    if isinstance(model, SlidingWindowSegmentor):
        return lambda model: _segmentor_loss(model, shape), []
    if isinstance(model, DINO):
        notes = [f"Decoder with {_DENOISING_SLOTS} denoising queries per image; activations leave the matching out"]
        return lambda model: _dino_loss(model, shape), notes
    if isinstance(model, GeneralizedRCNN) and isinstance(model.roi_heads, StandardROIHeads):
        heads = model.roi_heads
        share = f"{heads.positive_fraction:.0%} of {heads.batch_size_per_image}"
        notes = [f"Heads with as many boxes as they sample at most, masks for {share}; without the masks of the data"]
        return lambda model: _rcnn_loss(model, shape), notes
    notes = [f"Activations of {type(model).__name__}'s backbone only, without its heads"]
    return lambda model: squares(model.backbone(torch.empty(shape)).values()), notes


def _segmentor_loss(model: SlidingWindowSegmentor, shape: tuple[int, ...]) -> Tensor:
    features = model.backbone(torch.empty(shape))
    labels = torch.empty(shape[0], *shape[2:], dtype=torch.long)
    heads = [head for head in (model.sem_seg_head, model.auxiliary_head) if head is not None]
    return sum(loss for head in heads for loss in head.losses(head.layers(features), labels).values())


def _dino_loss(model: DINO, shape: tuple[int, ...]) -> Tensor:
    images = ImageList(torch.empty(shape), [tuple(shape[-2:])] * shape[0])
    maps = model.backbone(images.tensor)
    with torch.autocast("cpu", enabled=False):
        found = model.predict([maps[name] for name in model.in_features], images, _denoising(model, shape[0]))
        return squares([found.class_logits, found.boxes, found.encoder_logits, found.encoder_boxes])


def _denoising(model: DINO, batch_size: int) -> DenoisingQueries:
    rows = torch.empty(batch_size * _DENOISING_SLOTS, dtype=torch.long)
    layout = DenoisingLayout(
        num_groups=1, half=_DENOISING_SLOTS // 2, image=rows, slot=rows, box=rows, positive=rows > 0
    )
    content = model.label_embed(rows).unflatten(0, (batch_size, _DENOISING_SLOTS))
    box_logits = torch.empty(batch_size, _DENOISING_SLOTS, 4)
    return DenoisingQueries(
        layout=layout, labels=rows, boxes=torch.empty(len(rows), 4), content=content, box_logits=box_logits
    )


def _rcnn_loss(model: GeneralizedRCNN, shape: tuple[int, ...]) -> Tensor:
    maps = model.backbone(torch.empty(shape))
    rpn, heads = model.proposal_generator, model.roi_heads
    logits, deltas = rpn.rpn_head([maps[name] for name in rpn.in_features])
    outputs = [*logits, *deltas]
    boxes = shape[0] * heads.batch_size_per_image
    stages = zip(_list(heads.box_head), _list(heads.box_predictor), strict=True)
    for box_head, predictor in stages:
        outputs += predictor(box_head(_crops(maps, heads.box_in_features, boxes, heads.box_pooler.output_size)))
    if heads.mask_on:
        positive = int(boxes * heads.positive_fraction)
        for mask_head in _list(heads.mask_head):
            crops = _crops(maps, heads.mask_in_features, positive, heads.mask_pooler.output_size)
            outputs.append(mask_head.layers(crops))
    return squares(outputs)


def _list(heads: nn.Module) -> list[nn.Module]:
    """The heads of a cascade, or the one head."""
    return list(heads) if isinstance(heads, nn.ModuleList) else [heads]


def _crops(maps: dict[str, Tensor], names: list[str], boxes: int, size: tuple[int, int]) -> Tensor:
    """Crops of `boxes` boxes, from as many on every level; only sizes count."""
    parts = torch.arange(boxes).tensor_split(len(names))
    crops = [roi_align(maps[name], torch.empty(len(part), 5), size) for name, part in zip(names, parts, strict=True)]
    return torch.cat(crops)
