"""PIIP as a Detectron2 meta-architecture for image classification."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from piip_core import ConfigError
from piip_core.checkpoints import load_pretrained
from piip_core.classifier import PIIPClassifier
from piip_core.config import ClassifierConfig
from piip_core.recompute import GradCheckpointing


class ImageClassifier(PIIPClassifier):
    """`PIIPClassifier` that takes and gives what Detectron2's training and evaluation do.

    Weights have the names of `PIIPClassifier`.

    Args:
        config (ClassifierConfig): pyramid and head.
        pixel_mean (Sequence[float]): per channel, in the order of the images.
        pixel_std (Sequence[float]): per channel.
        input_format (str): channel order that the model expects, for tools that read images.
        pretrained (bool): load the weights that the branches name in `BranchConfig.pretrained`. Turn it off when a
            checkpoint of the whole model follows. Nothing is loaded on the meta device.
        use_act_checkpoint (bool | str): recompute activations in the backward pass to save memory; "cheap" recomputes
            interactions, and of blocks all but matrix products, convolutions and self-attention.
        random_erasing (Callable): timm's `RandomErasing` of normalised training images; may be None.
        mixup (Mixup): timm's mixup and cutmix of training batches; may be None.
        label_smoothing (float): of the cross entropy without mixup; `mixup` smooths itself.
        loss (nn.Module): of logits, and of labels or what mixup makes of them, for example timm's
            `BinaryCrossEntropy`; None for the cross entropy.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        pretrained: bool = True,
        use_act_checkpoint: GradCheckpointing = False,
        random_erasing: Callable[[Tensor], Tensor] | None = None,
        mixup: Mixup | None = None,
        label_smoothing: float = 0.0,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__(config)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.input_format = input_format
        self.random_erasing, self.mixup = random_erasing, mixup
        if mixup is not None and mixup.num_classes != config.num_classes:
            raise ConfigError(f"model.mixup.num_classes={mixup.num_classes}: expected {config.num_classes}")
        plain = SoftTargetCrossEntropy() if mixup else nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.loss = loss or plain
        self.set_grad_checkpointing(use_act_checkpoint)
        if pretrained and not next(self.parameters()).is_meta:
            load_pretrained(self)

    @property
    def device(self) -> torch.device:
        """Device of the model, to which images are moved."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Loss in training, scores otherwise.

        Args:
            batched_inputs: Per image "image" (3, H, W), values as in a file, all of one size; in training "label", the
                index of its class.

        Returns:
            {"loss_cls": mean loss}, or per image {"scores": logits (num_classes,) float32}.

        Raises:
            ValueError: If images have several sizes, or in training a label is missing.
        """
        images = self._normalised(batched_inputs)
        if not self.training:
            return [{"scores": scores} for scores in super().forward(images).float()]
        targets = self._labels(batched_inputs)
        if self.random_erasing is not None:
            images = self.random_erasing(images)
        if self.mixup is not None:
            if len(images) % 2:
                raise ConfigError(
                    f"mixup with {len(images)} images per process: expected an even number; change "
                    "dataloader.train.total_batch_size"
                )
            images, targets = self.mixup(images, targets)
        return {"loss_cls": self.loss(super().forward(images).float(), targets)}

    def _normalised(self, batched_inputs: Sequence[Mapping[str, Any]]) -> Tensor:
        images = [entry["image"] for entry in batched_inputs]
        sizes = sorted({tuple(image.shape) for image in images})
        if len(sizes) > 1:
            raise ValueError(f"images of sizes {sizes}: expected one size in a batch; crop them, or give one at a time")
        return (torch.stack(images).to(self.device) - self.pixel_mean) / self.pixel_std

    def _labels(self, batched_inputs: Sequence[Mapping[str, Any]]) -> Tensor:
        for entry in batched_inputs:
            label = entry.get("label")
            if label is None or not 0 <= label < self.num_classes:
                raise ValueError(
                    f"{entry.get('file_name', 'training image')}: label {label}: expected 0 to {self.num_classes - 1}"
                )
        return torch.tensor([entry["label"] for entry in batched_inputs], device=self.device)
