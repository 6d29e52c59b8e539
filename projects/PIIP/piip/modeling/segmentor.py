"""Semantic segmentation: backbone, head and auxiliary head, with sliding-window inference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from detectron2.modeling import Backbone, SemanticSegmentor
from detectron2.structures import ImageList
from torch import Tensor

from .upernet import SegmentationHead


class SlidingWindowSegmentor(SemanticSegmentor):
    """Detectron2's `SemanticSegmentor` with the published training batch, auxiliary loss and inference.

    Published inference ("slide") runs the network on overlapping windows, averages their logits pixel by pixel and
    resizes the average to the original image; "whole" runs it on the padded image.

    Args:
        backbone (Backbone): gives the maps that the heads read.
        sem_seg_head (SegmentationHead): predicts.
        auxiliary_head (SegmentationHead): adds a loss in training, does nothing else; may be None.
        pixel_mean (Sequence[float]): per channel, in the order of the images.
        pixel_std (Sequence[float]): per channel.
        input_format (str): channel order that the model expects, for tools that read images.
        train_size (int): training images are padded to at least a square of this side, as the published ones are to
            the size of their crops; 0: to the largest of the batch. They all come to a multiple of the backbone's
            divisor, too.
        inference (str): "slide" or "whole".
        window (int | Sequence[int]): side, or height and width, of the windows.
        stride (int | Sequence[int]): step from window to window.
        window_batch_size (int): windows of an image that go through the network together.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: SegmentationHead,
        auxiliary_head: SegmentationHead | None = None,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        train_size: int = 0,
        inference: Literal["slide", "whole"] = "slide",
        window: int | Sequence[int] = 512,
        stride: int | Sequence[int] = 341,
        window_batch_size: int = 1,
    ) -> None:
        super().__init__(backbone=backbone, sem_seg_head=sem_seg_head, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.auxiliary_head, self.input_format, self.train_size = auxiliary_head, input_format, train_size
        self.inference, self.window_batch_size = inference, window_batch_size
        self.window, self.stride = _pair("window", window), _pair("stride", stride)
        if inference not in ("slide", "whole"):
            raise ValueError(f"inference={inference!r}: expected 'slide' or 'whole'")
        if any(step > side for step, side in zip(self.stride, self.window, strict=True)):
            raise ValueError(f"stride={stride}: expected at most window={window}, else pixels between are left out")
        if window_batch_size < 1:
            raise ValueError(f"window_batch_size={window_batch_size}: expected one or more")

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training, predictions otherwise.

        Args:
            batched_inputs: Per image "image" (3, H, W); in training "sem_seg" (H, W) int64; in inference "height"
                and "width" of the original image, if it had another size.

        Returns:
            Losses by name, or per image {"sem_seg": logits (num_classes, height, width)}.

        Raises:
            ValueError: In training, if a label map is missing or not of its image's size.
        """
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        if self.training:
            return self._losses(images, batched_inputs)
        run = self.slide_logits if self.inference == "slide" else self.whole_logits
        # Images of several sizes go one by one: what a larger one adds in padding would change the others' results
        together = len({image.shape for image in images}) == 1
        batches = [torch.stack(images)] if together else [image[None] for image in images]
        results = [logits for batch in batches for logits in run(batch)]
        outputs = []
        for image, logits, entry in zip(images, results, batched_inputs, strict=True):
            size = tuple(image.shape[-2:])
            original = (entry.get("height", size[0]), entry.get("width", size[1]))
            outputs.append({"sem_seg": self.to_original(logits, size, original)})
        return outputs

    def _losses(self, images: list[Tensor], batched_inputs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        targets = []
        for image, entry in zip(images, batched_inputs, strict=True):
            labels = entry.get("sem_seg")
            if labels is None or labels.shape != image.shape[-2:]:
                found = "none" if labels is None else f"of {tuple(labels.shape)}"
                raise ValueError(
                    f"{entry.get('file_name', 'training image')}: expected a label map 'sem_seg' of "
                    f"{tuple(image.shape[-2:])} (h, w) like the image, found {found}"
                )
            targets.append(labels.to(self.device))
        features = self.backbone(self._training_batch(images))
        labels = self._training_batch(targets, self.sem_seg_head.ignore_value)
        losses = self.sem_seg_head.losses(self.sem_seg_head.layers(features), labels)
        if self.auxiliary_head is not None:
            logits = self.auxiliary_head.layers(features)
            losses |= self.auxiliary_head.losses(logits, labels, name="sem_seg_aux")
        return losses

    def _training_batch(self, tensors: list[Tensor], pad_value: float = 0.0) -> Tensor:
        constraints = dict(self.backbone.padding_constraints)
        if max(side for tensor in tensors for side in tensor.shape[-2:]) <= self.train_size:
            constraints["square_size"] = self.train_size
        return ImageList.from_tensors(tensors, self.backbone.size_divisibility, pad_value, constraints).tensor

    def slide_logits(self, images: Tensor) -> Tensor:
        """Mean logits (B, num_classes, H, W) of all windows over normalised images (B, 3, H, W)."""
        (height, width), (tall, wide) = images.shape[-2:], self.window
        corners = [
            (y, x)
            for y in window_starts(height, tall, self.stride[0])
            for x in window_starts(width, wide, self.stride[1])
        ]
        total = images.new_zeros(len(images), self.sem_seg_head.num_classes, height, width, dtype=torch.float32)
        count = images.new_zeros(height, width, dtype=torch.float32)
        for first in range(0, len(corners), self.window_batch_size):
            chosen = corners[first : first + self.window_batch_size]
            windows = torch.cat([images[..., y : y + tall, x : x + wide] for y, x in chosen])
            for (y, x), logits in zip(chosen, self.whole_logits(windows).split(len(images)), strict=True):
                total[..., y : y + tall, x : x + wide] += logits
                count[y : y + tall, x : x + wide] += 1
        return total / count

    def whole_logits(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes, H, W) float32 of normalised images (B, 3, H, W), all of them at once.

        Images that are no multiple of the backbone's divisor are padded at the bottom and right for it.
        """
        height, width = images.shape[-2:]
        divisor = max(self.backbone.size_divisibility, 1)
        images = F.pad(images, (0, -width % divisor, 0, -height % divisor))
        logits = self.sem_seg_head.layers(self.backbone(images)).float()
        return self.sem_seg_head.resize(logits, tuple(images.shape[-2:]))[..., :height, :width]

    def to_original(self, logits: Tensor, image_size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
        """Logits (C, H, W) without what was padded to `image_size`, resized to the original image's size."""
        inside = logits[None, :, : image_size[0], : image_size[1]]
        return self.sem_seg_head.resize(inside, original_size)[0]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one axis: every `stride`, the last window moved back to end at the border.

    An axis shorter than the window has one start, 0.
    """
    beyond = max(length - window, 0)
    return [min(k * stride, beyond) for k in range(math.ceil(beyond / stride) + 1)]


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name}={value}: expected a positive number of pixels, or a height and a width")
    return pair
