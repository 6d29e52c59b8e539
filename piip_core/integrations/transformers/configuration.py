"""Configuration and image processor of PIIP models in transformers' manner."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import BitImageProcessorPil, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from ... import zoo
from ...config import ClassifierConfig, MergingConfig, PIIPConfig
from ...zoo.entry import IMAGENET_MEAN, IMAGENET_STD


@strict
class PIIPTransformersConfig(BackboneConfigMixin, PreTrainedConfig):
    """A pyramid, and what classifiers and backbones put on it.

    The number of classes and their names are transformers' `num_labels`, `id2label` and `label2id`; which of its maps a
    backbone returns, `out_features` or `out_indices` ("stage1" ... from the finest; all of them by default).

    Attributes:
        pyramid: `PIIPConfig.to_dict()`; None for that of the smallest published classifier. Where its `merging` is
            None, a backbone gets the usual `MergingConfig()`; classifiers leave it out.
        head: As in `ClassifierConfig`.
        pooling: As in `ClassifierConfig`.
        num_groups: As in `ClassifierConfig`.
        drop_rate: As in `ClassifierConfig`.
        num_channels: Channels of the images, always 3.
    """

    model_type = "piip"

    pyramid: dict[str, Any] | None = None
    head: Literal["separate", "merged"] = "separate"
    pooling: Literal["class_token", "first_patch", "average"] = "class_token"
    num_groups: int = 32
    drop_rate: float = 0.0
    num_channels: Literal[3] = 3
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pyramid is None:
            self.pyramid = zoo.classification("piip_tsb_368_192_128").training_config.pyramid.to_dict()
        levels = len(self.dense.merging.out_strides)
        self.stage_names = [f"stage{number}" for number in range(1, levels + 1)]
        features, indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if features is None and indices is None:
            features = list(self.stage_names)
        self.set_output_features_output_indices(features, indices)
        super().__post_init__(**kwargs)
        _ = self.classifier  # wrong values are errors here, not when a model is built

    @classmethod
    def from_zoo(cls, name: str, *, training: bool = False, **options: Any) -> PIIPTransformersConfig:
        """The configuration of a published model.

        Args:
            name: In `zoo.classification_entries()` or `zoo.entries()` (backbones of detectors and segmentors).
            training: For a classifier, the form that new training starts from, with class tokens, instead of the one
                that the published weights need.
            **options: Fields of the configuration: num_labels, id2label ... By default a classifier has ImageNet's.

        Raises:
            ConfigError: For an unknown name; the message lists the closest ones.
        """
        entry = zoo.find(name)
        if isinstance(entry, zoo.ZooEntry):
            return cls.from_pyramid(entry.config, **options)
        if not {"num_labels", "id2label"} & set(options):
            options["id2label"] = _imagenet_labels()
        return cls.from_classifier(entry.training_config if training else entry.config, **options)

    @classmethod
    def from_classifier(cls, config: ClassifierConfig, **options: Any) -> PIIPTransformersConfig:
        """The same as `config`; options are further fields, `id2label` names the classes."""
        fields = config.to_dict()
        num_classes = fields.pop("num_classes")
        if options.get("id2label") is not None:
            options.setdefault("label2id", {label: index for index, label in options["id2label"].items()})
        else:
            options.setdefault("num_labels", num_classes)
        return cls(**fields, **options)

    @classmethod
    def from_pyramid(cls, config: PIIPConfig, **options: Any) -> PIIPTransformersConfig:
        """A backbone's configuration, with or without merging; a classifier made of it averages its patch tokens."""
        return cls(pyramid=config.to_dict(), **{"pooling": "average", **options})

    @property
    def classifier(self) -> ClassifierConfig:
        """Pyramid and head of the classifier."""
        names = {field.name for field in dataclasses.fields(ClassifierConfig)} - {"pyramid", "num_classes"}
        return ClassifierConfig(
            pyramid=dataclasses.replace(PIIPConfig.from_dict(self.pyramid), merging=None),
            num_classes=self.num_labels,
            **{name: getattr(self, name) for name in names},
        )

    @property
    def dense(self) -> PIIPConfig:
        """Pyramid and merging of the backbone."""
        pyramid = PIIPConfig.from_dict(self.pyramid)
        return pyramid if pyramid.merging is not None else dataclasses.replace(pyramid, merging=MergingConfig())

    @property
    def image_size(self) -> int:
        """Side of the square image in pixels: the largest image size of a branch."""
        return self.classifier.image_size

    @property
    def hidden_size(self) -> int:
        """Width of Branch 1."""
        return self.dense.branches[0].network.dims[-1]


def make_image_processor(config: PIIPTransformersConfig) -> BitImageProcessorPil:
    """The processor with which classifiers are evaluated: short side to the input size (bicubic), centre crop.

    It resizes with Pillow, as timm's evaluation does. What it saves, `AutoImageProcessor` loads without this package;
    by default with torchvision, which differs by at most rounding; `backend="pil"` chooses Pillow.
    """
    side = config.image_size
    return BitImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[value / 255 for value in IMAGENET_MEAN],
        image_std=[value / 255 for value in IMAGENET_STD],
    )


def _imagenet_labels() -> dict[int, str]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return {index: info.index_to_description(index) for index in range(info.num_classes())}
