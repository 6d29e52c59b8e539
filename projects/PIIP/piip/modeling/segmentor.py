"""Semantic segmentation: UperNet and FCN heads (Xiao et al. 2018, arXiv:1807.10221), and sliding-window inference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import Backbone, SemanticSegmentor
from detectron2.structures import ImageList
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn


class SegmentationHead(nn.Module):
    """What the heads share: classifier, upsampling, loss; subclasses make the features that are classified.

    Runs in the precision of its weights whatever autocast says: float32 for published models. `SlidingWindowSegmentor`
    calls `layers` and `losses`.

    Args:
        input_shape (dict[str, ShapeSpec]): backbone maps that the head reads.
        num_classes (int): classes, without the ignored one.
        channels (int): width of the classified features.
        dropout (float): share of channels dropped before the classifier.
        init_std (float): standard deviation of the classifier's first weights. The published one suits the published
            learning rate; at one twenty times higher it lets a backbone forget what it learned before.
        align_corners (bool): of every bilinear resizing.
        ignore_value (int): label of pixels without a class.
        loss_weight (float): factor of the loss.
        loss_average (str): what the sum of the cross-entropy is divided by: "all" pixels, ignored ones included
            (published), or the "valid" ones only.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        channels: int,
        dropout: float = 0.1,
        init_std: float = 0.01,
        align_corners: bool = False,
        ignore_value: int = 255,
        loss_weight: float = 1.0,
        loss_average: Literal["all", "valid"] = "all",
    ) -> None:
        super().__init__()
        if num_classes < 2 or 0 <= ignore_value < num_classes:
            raise ValueError(
                f"num_classes={num_classes}, ignore_value={ignore_value}: expected two classes or more, and an "
                "ignore_value that is none of them"
            )
        if loss_average not in ("all", "valid"):
            raise ValueError(f"loss_average={loss_average!r}: expected 'all' or 'valid'")
        by_stride = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in by_stride]
        self.in_channels = [shape.channels for _, shape in by_stride]
        self.num_classes, self.ignore_value, self.align_corners = num_classes, ignore_value, align_corners
        self.loss_weight, self.loss_average = loss_weight, loss_average
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = Conv2d(channels, num_classes, kernel_size=1)
        nn.init.normal_(self.conv_seg.weight, std=init_std)
        nn.init.zeros_(self.conv_seg.bias)

    def layers(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, num_classes, H / stride, W / stride) from the backbone maps, by name."""
        maps = [features[name].to(self.conv_seg.weight.dtype) for name in self.in_features]
        # the meta device, on which FLOPs are counted, has no autocast to turn off
        device = maps[0].device.type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            return self.conv_seg(self.dropout(self.fuse(maps)))

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """Features (B, channels, H / stride, W / stride) for the classifier, from the maps of `in_features`."""
        raise NotImplementedError

    def resize(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Bilinear resizing of (B, C, H, W) to a height and width."""
        return F.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners)

    def losses(self, logits: Tensor, targets: Tensor, *, name: str = "sem_seg") -> dict[str, Tensor]:
        """Cross-entropy at the resolution of the labels; logs "NAME/accuracy", the right ones of 100 valid pixels.

        Args:
            logits: (B, num_classes, h, w) of `layers`.
            targets: (B, H, W) int64, classes or `ignore_value`.
            name: Tells the heads of a model apart.

        Returns:
            {"loss_NAME": scalar}, weighted. 0 if every pixel is ignored.
        """
        logits = self.resize(logits.float(), tuple(targets.shape[-2:]))
        # not reduction="sum", whose CUDA kernel is not deterministic
        per_pixel = F.cross_entropy(logits, targets, ignore_index=self.ignore_value, reduction="none")
        valid = targets != self.ignore_value
        count = targets.numel() if self.loss_average == "all" else valid.sum().clamp(min=1)
        if has_event_storage():
            right = (logits.detach().argmax(dim=1) == targets) & valid
            accuracy = 100.0 * right.sum() / valid.sum().clamp(min=1)
            get_event_storage().put_scalar(f"{name}/accuracy", accuracy.item())
        return {f"loss_{name}": self.loss_weight * per_pixel.sum() / count}


class UperNetHead(SegmentationHead):
    """Pyramid pooling on the coarsest map, a feature pyramid over all of them, and their fusion on the finest grid.

    Args:
        norm (str): norm after the convolutions, a name that Detectron2's `get_norm` knows. Published: "SyncBN";
            "naiveSyncBN" does the same where several processes train on CPUs.
        pool_scales (Sequence[int]): sides of the grids to which pyramid pooling averages.
        kwargs: as for `SegmentationHead`.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        channels: int,
        norm: str = "SyncBN",
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        **kwargs: Any,
    ) -> None:
        super().__init__(input_shape, num_classes=num_classes, channels=channels, **kwargs)
        if len(self.in_channels) < 2:
            raise ValueError(f"input_shape has {self.in_features}: UperNet expects two maps or more")
        *finer, coarsest = self.in_channels
        self.pool_scales = tuple(pool_scales)
        self.psp_modules = nn.ModuleList(_conv(coarsest, channels, 1, norm) for _ in self.pool_scales)
        self.bottleneck = _conv(coarsest + len(self.pool_scales) * channels, channels, 3, norm)
        self.lateral_convs = nn.ModuleList(_conv(width, channels, 1, norm) for width in finer)
        self.fpn_convs = nn.ModuleList(_conv(channels, channels, 3, norm) for _ in finer)
        self.fpn_bottleneck = _conv(len(self.in_channels) * channels, channels, 3, norm)

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """Fuses maps (B, C_l, H_l, W_l), finest first, to (B, channels, H_0, W_0)."""
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, maps, strict=False)]
        levels.append(self.pool(maps[-1]))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + self.resize(levels[i], tuple(levels[i - 1].shape[-2:]))
        # the pooled level goes through unchanged
        outputs = [*(conv(x) for conv, x in zip(self.fpn_convs, levels, strict=False)), levels[-1]]
        size = tuple(outputs[0].shape[-2:])
        return self.fpn_bottleneck(torch.cat([outputs[0], *(self.resize(x, size) for x in outputs[1:])], dim=1))

    def pool(self, x: Tensor) -> Tensor:
        """Pyramid pooling: (B, C, h, w) of the coarsest map to (B, channels, h, w)."""
        self._check_batch(x)
        size = tuple(x.shape[-2:])
        pooled = [
            self.resize(conv(F.adaptive_avg_pool2d(x, scale)), size)
            for conv, scale in zip(self.psp_modules, self.pool_scales, strict=True)
        ]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))

    def _check_batch(self, x: Tensor) -> None:
        norm = self.bottleneck.norm
        alone = type(norm) is nn.BatchNorm2d or comm.get_world_size() == 1
        batch_norm = isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
        if self.training and batch_norm and alone and len(x) == 1 and 1 in self.pool_scales:
            raise ValueError(
                "one training image per process: pyramid pooling to 1x1 leaves batch norm a single value. Give each "
                "process two images or more (dataloader.train.total_batch_size), or use SyncBN on several GPUs"
            )


class FCNHead(SegmentationHead):
    """A 3x3 convolution and a classifier on one backbone map: the auxiliary head of training.

    Args:
        norm (str): as for `UperNetHead`.
        kwargs: as for `SegmentationHead`.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        channels: int,
        norm: str = "SyncBN",
        **kwargs: Any,
    ) -> None:
        super().__init__(input_shape, num_classes=num_classes, channels=channels, **kwargs)
        if len(self.in_channels) != 1:
            raise ValueError(f"input_shape has {self.in_features}: expected one map")
        self.convs = nn.Sequential(_conv(self.in_channels[0], channels, 3, norm))

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """Convolves the one map, (B, C, H, W) to (B, channels, H, W)."""
        return self.convs(maps[0])


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: str) -> Conv2d:
    """Convolution without bias, norm, ReLU; keeps height and width."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=kernel_size // 2,
        bias=False,
        norm=get_norm(norm, out_channels),
        activation=F.relu,
    )
    weight_init.c2_msra_fill(conv)
    return conv


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
