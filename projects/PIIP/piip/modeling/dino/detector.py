"""DINO as a Detectron2 meta-architecture."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.layers import Conv2d
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torchvision.ops import box_convert

from .criterion import DINOCriterion
from .denoising import ContrastiveDenoising, DenoisingDraws, DenoisingQueries
from .geometry import Target, image_scale, inverse_sigmoid, make_target
from .transformer import MLP, DINOTransformer

_PRIOR = 0.01  # initial score of every class


class ChannelMapper(nn.Module):
    """Projects every map by a 1x1 convolution, and makes one more level of half the size from the last backbone map.

    All convolutions are without bias and followed by a group norm; there is no activation.

    Args:
        in_dims: channels of the backbone's maps, largest map first.
        embed_dim: channels of every output map.
        num_groups: groups of the norms.
    """

    def __init__(self, in_dims: Sequence[int], embed_dim: int, *, num_groups: int = 32) -> None:
        super().__init__()
        kernels = [(dim, 1) for dim in in_dims] + [(in_dims[-1], 3)]
        self.convs = nn.ModuleList(
            Conv2d(
                dim,
                embed_dim,
                kernel,
                stride=2 if kernel == 3 else 1,
                padding=kernel // 2,
                bias=False,
                norm=nn.GroupNorm(num_groups, embed_dim),
            )
            for dim, kernel in kernels
        )
        for conv in self.convs:
            nn.init.xavier_uniform_(conv.weight)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_l, H_l, W_l) to maps (B, embed_dim, H_l, W_l) and one (B, embed_dim, H/2, W/2), rounded up."""
        return [conv(x) for conv, x in zip(self.convs, [*maps, maps[-1]], strict=True)]


class Predictions(NamedTuple):
    """Predictions of a batch, denoising queries first; boxes are (cx, cy, w, h) relative to the un-padded image."""

    class_logits: Tensor  # (layers, B, slots + Q, num_classes) of the decoder
    boxes: Tensor  # (layers, B, slots + Q, 4)
    encoder_logits: Tensor  # (B, Q, num_classes) of the encoder's proposals
    encoder_boxes: Tensor  # (B, Q, 4)


class DINO(nn.Module):
    """DETR with improved denoising anchor boxes (Zhang et al., 2022), by the rules of the published PIIP detectors.

    Neck and head compute in float32 also under autocast, as published.

    Args:
        backbone: with three maps, say, of strides 8, 16 and 32.
        transformer: encoder, query selection and decoder; with one level more than `in_features`.
        criterion: losses.
        denoising: makes the denoising queries of training.
        num_classes: number of classes.
        pixel_mean: mean of every channel, subtracted from images.
        pixel_std: standard deviation of every channel, by which they are divided then.
        in_features: names of the backbone's maps, largest map first.
        num_groups: groups of the neck's norms.
        input_format: order of the channels, "RGB" or "BGR", for those who show images.
        max_detections: detections per image, unless queries times classes are fewer.

    Raises:
        ValueError: if the number of levels does not fit, or the backbone lacks a map.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        transformer: DINOTransformer,
        criterion: DINOCriterion,
        denoising: ContrastiveDenoising,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        in_features: Sequence[str] = ("res3", "res4", "res5"),
        num_groups: int = 32,
        input_format: str = "RGB",
        max_detections: int = 300,
    ) -> None:
        super().__init__()
        shapes = backbone.output_shape()
        if not set(in_features) <= shapes.keys():
            raise ValueError(f"in_features={list(in_features)}: expected some of the backbone's {list(shapes)}")
        if transformer.num_levels != len(in_features) + 1:
            raise ValueError(
                f"transformer.num_levels={transformer.num_levels}: expected {len(in_features) + 1}, one for each of "
                f"in_features={list(in_features)} and one that the neck adds"
            )
        self.backbone, self.transformer = backbone, transformer
        self.criterion, self.denoising = criterion, denoising
        self.in_features, self.num_classes = tuple(in_features), num_classes
        self.input_format, self.max_detections = input_format, max_detections
        width, branches = transformer.embed_dim, transformer.num_decoder_layers + 1
        self.neck = ChannelMapper([shapes[name].channels for name in in_features], width, num_groups=num_groups)
        class_branch, box_branch = nn.Linear(width, num_classes), MLP((width, width, width, 4))
        nn.init.constant_(class_branch.bias, -math.log(1 / _PRIOR - 1))
        nn.init.zeros_(box_branch.layers[-1].weight)
        nn.init.zeros_(box_branch.layers[-1].bias)
        # one per decoder layer, which start the same and learn for themselves; the last is the encoder's
        self.class_embed = nn.ModuleList(copy.deepcopy(class_branch) for _ in range(branches))
        self.bbox_embed = nn.ModuleList(copy.deepcopy(box_branch) for _ in range(branches))
        self.label_embed = nn.Embedding(num_classes, width)
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(list(values)).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Device of the model, to which images are moved."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Losses in training, else detections.

        Args:
            batched_inputs: One dictionary per image, as from Detectron2's mappers: "image" (C, H, W), in training
                "instances" with gt_boxes and gt_classes, else optionally "height" and "width" of the original image.

        Returns:
            In training the losses by name, see `DINOCriterion`. Else {"instances": Instances} per image, with
            `max_detections` entries, best first: pred_boxes in the original image, scores, pred_classes.

        Raises:
            ValueError: If ground truth is missing or of a class the model does not have, or if the images are too small
                for the number of queries.
            FloatingPointError: If training diverged.
        """
        if self.training:
            targets = self._targets(batched_inputs)
        images = self._batch(batched_inputs)
        maps = self.backbone(images.tensor)
        maps = [maps[name] for name in self.in_features]
        if self.training:
            return self.losses(maps, images, targets)
        found = self.detect(maps, images)
        return [{"instances": to_original(x, inputs)} for x, inputs in zip(found, batched_inputs, strict=True)]

    def losses(
        self, maps: Sequence[Tensor], images: ImageList, targets: Sequence[Target], draws: DenoisingDraws | None = None
    ) -> dict[str, Tensor]:
        """Losses from the backbone's maps named in `in_features`; of the images only the sizes count."""
        with torch.autocast(self.device.type, enabled=False):
            denoising = self.denoising(targets, self.label_embed, draws)
            return self.criterion(*self.predict(maps, images, denoising), targets, denoising.layout)

    def detect(self, maps: Sequence[Tensor], images: ImageList) -> list[Instances]:
        """Detections in the resized images, with the "query" that each comes from; arguments as for `losses`.

        There is neither a threshold nor non-maximum suppression: a query may appear with several classes.
        """
        with torch.autocast(self.device.type, enabled=False):
            found = self.predict(maps, images)
            scores = found.class_logits[-1].sigmoid().flatten(1)
            scores, index = scores.topk(min(self.max_detections, scores.shape[1]), dim=1)
        rows = zip(images.image_sizes, scores, index, found.boxes[-1], strict=True)
        return [self._instances(*row) for row in rows]

    def predict(
        self, maps: Sequence[Tensor], images: ImageList, denoising: DenoisingQueries | None = None
    ) -> Predictions:
        """Predictions of all decoder layers and of the encoder."""
        maps = self.neck([x.to(self.label_embed.weight.dtype) for x in maps])
        padded_size = tuple(images.tensor.shape[-2:])
        out = self.transformer(maps, images.image_sizes, padded_size, self.class_embed, self.bbox_embed, denoising)
        logits, boxes = self.decode_heads(out.hidden, out.references)
        return Predictions(torch.stack(logits), torch.stack(boxes), out.selection.class_logits, out.selection.boxes)

    def decode_heads(self, hidden: Sequence[Tensor], references: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Class logits and boxes after every decoder layer, from the boxes that the layer started from."""
        logits = [branch(x) for branch, x in zip(self.class_embed[:-1], hidden, strict=True)]
        boxes = [
            torch.sigmoid(branch(x) + inverse_sigmoid(reference))
            for branch, x, reference in zip(self.bbox_embed[:-1], hidden, references[:-1], strict=True)
        ]
        return logits, boxes

    def _targets(self, batched_inputs: list[dict[str, Any]]) -> list[Target]:
        if any("instances" not in inputs for inputs in batched_inputs):
            raise ValueError("training without ground truth: expected 'instances' for every image; eval() detects")
        dtype = self.label_embed.weight.dtype
        return [make_target(inputs["instances"], self.num_classes, self.device, dtype) for inputs in batched_inputs]

    def _batch(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalised images, padded with zeros at the bottom and right."""
        images = [(inputs["image"].to(self.device) - self.pixel_mean) / self.pixel_std for inputs in batched_inputs]
        return ImageList.from_tensors(
            images, self.backbone.size_divisibility, padding_constraints=self.backbone.padding_constraints
        )

    def _instances(self, image_size: tuple[int, int], scores: Tensor, index: Tensor, boxes: Tensor) -> Instances:
        query = index // self.num_classes
        boxes = Boxes(box_convert(boxes[query], "cxcywh", "xyxy") * image_scale(image_size, like=boxes))
        boxes.clip(image_size)
        return Instances(
            image_size, pred_boxes=boxes, scores=scores, pred_classes=index % self.num_classes, query=query
        )


def to_original(found: Instances, inputs: dict[str, Any]) -> Instances:
    """Boxes in the original image.

    Detectron2's `detector_postprocess` would clip after the rescaling and drop boxes without area; as published, they
    were clipped before, and all are kept.
    """
    height, width = (inputs.get(name, side) for name, side in zip(("height", "width"), found.image_size, strict=True))
    rows = found.pred_boxes.tensor
    factors = image_scale(found.image_size, like=rows) / image_scale((height, width), like=rows)
    return Instances(
        (height, width), pred_boxes=Boxes(rows / factors), scores=found.scores, pred_classes=found.pred_classes
    )
