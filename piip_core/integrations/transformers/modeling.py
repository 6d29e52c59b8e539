"""PIIP as transformers' models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import initialization
from transformers.backbone_utils import BackboneMixin
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput, ModelOutput
from transformers.utils import can_return_tuple

from ... import zoo
from ...branches import BranchState
from ...checkpoints import load_checkpoint
from ...classifier import PIIPClassifier, head_inputs
from ...config import ClassifierConfig
from ...errors import ConfigError, UserError
from ...pyramid import PIIP, DensePIIP, dense_maps, to_maps
from .card import PushWithCard
from .configuration import PIIPTransformersConfig

Maps = tuple[Tensor, ...]
Module = TypeVar("Module", bound=nn.Module)
Model = TypeVar("Model", bound="PIIPPreTrainedModel")


@dataclass
class PIIPModelOutput(ModelOutput):
    """What models without classifier return.

    Attributes:
        feature_maps: Final map of every branch, (B, C_i, H_i, W_i), Branch 1 first.
        pooler_output: What the classifier reads, (B, width): the pooled and normalised features of all branches side by
            side for separate heads, of the merged map for a merged one. None for a vision tower.
        hidden_states: With `output_hidden_states`: the maps of all branches after each interaction and at the end.
    """

    feature_maps: Maps | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Maps, ...] | None = None


class PIIPPreTrainedModel(PushWithCard):
    """What all models with a PIIP as their `pyramid` have in common, whatever their configuration."""

    pyramid: PIIP
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    # Branches run block by block and hand on class tokens beside their maps: a pyramid stays on one device
    _no_split_modules = ["PIIP"]
    # timm's blocks always call PyTorch's scaled_dot_product_attention, which takes the fastest kernel there is
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_released(cls: type[Model], name: str, *, ema: bool = False, **options: Any) -> Model:
        """A released model with its weights, in evaluation mode; they are fetched at the first call.

        Args:
            name: A classifier, or a detector or segmentor for its backbone; see `zoo.released`.
            ema: Of a classifier, the moving average of the weights.
            **options: Fields of the configuration.

        Raises:
            ConfigError: For an unknown name, with the closest ones in the message, or that of a chat model.
            CheckpointError: If the weights cannot be had; see `fetch_released`.
        """
        released = zoo.released(name)
        if isinstance(released.entry, zoo.MultimodalEntry):
            raise ConfigError(f"{name}: is a chat model; llava_piip.ChatModel loads it")
        held = released.config
        config = PIIPTransformersConfig.from_zoo(name, **options)
        config.pyramid = (held.pyramid if isinstance(held, ClassifierConfig) else held).to_dict()
        config.name_or_path = name
        model = cls(config)
        load_checkpoint(model, name, ema=ema)
        return model.eval()

    @property
    def gradient_checkpointing(self) -> bool:
        """transformers switches gradient checkpointing on and off by this attribute."""
        return any(branch.grad_checkpointing for branch in self.pyramid.branches)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.pyramid.set_grad_checkpointing(enable)

    @contextmanager
    def image(self, pixel_values: Tensor) -> Iterator[Tensor]:
        """Images in the dtype of the model, while its networks have their position tables at hand.

        accelerate brings what it keeps in the main memory or on disk when the forward of its owner is called; a
        pyramid never calls that of a branch's network.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise UserError(
                f"pixel_values of shape {tuple(pixel_values.shape)}: expected (batch, 3, height, width), as the image "
                "processor makes them"
            )
        with ExitStack() as stack:
            for branch in self.pyramid.branches:
                stack.enter_context(align_module_device(branch.model))
            yield pixel_values.to(self.dtype)

    def states(
        self, pixel_values: Tensor, output_hidden_states: bool | None
    ) -> tuple[list[BranchState], tuple[Maps, ...] | None]:
        """Final states, and all hidden states where they are asked for."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        after = range(len(self.pyramid.interactions)) if output_hidden_states else ()
        with self.image(pixel_values) as image:
            states, between = self.pyramid.forward_states(image, after)
        hidden_states = tuple(tuple(to_maps(found)) for found in (*(between[k] for k in after), states))
        return states, hidden_states if output_hidden_states else None

    def post_init(self) -> None:
        """Ends construction as transformers does, noting first whether the weights are still on the meta device."""
        # Modules start their own weights in their constructors; on the meta device there was nothing to start
        self._made_without_weights = any(parameter.is_meta for parameter in self.parameters())
        super().post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Fills what a file did not hold; transformers calls this for every module with something of that kind."""
        getattr(module, "init_non_persistent_buffers", lambda: None)()
        if self._made_without_weights and not all(map(is_loaded, module.parameters(recurse=False))):
            self._start_missing_weights()

    def _start_missing_weights(self) -> None:
        """Gives all that a file did not hold (a head for other classes) the values of a new model."""
        self._made_without_weights = False
        tensors = self.state_dict(keep_vars=True)
        missing = {name: tensor for name, tensor in tensors.items() if not (tensor.is_meta or is_loaded(tensor))}
        with torch.device("cpu"):
            fresh = type(self)(copy.deepcopy(self.config)).state_dict()
        for name, tensor in missing.items():
            initialization.copy_(tensor, fresh[name])


def is_loaded(tensor: Tensor) -> bool:
    """Whether transformers has filled a tensor from a file.

    Its flag for that is private. Its initialisers, such as `copy_`, leave such tensors alone by themselves, but only
    the flag says in time that there is nothing to start, and no other model to be made for its values. Seen working
    with transformers 5.16 to 5.24.
    """
    return getattr(tensor, "_is_hf_initialized", False)


class _WithHead(PIIPPreTrainedModel):
    """A pyramid and a head, under the names of `PIIPClassifier`."""

    config_class = PIIPTransformersConfig
    config: PIIPTransformersConfig

    def _make(self, config: ClassifierConfig) -> None:
        model = build_then_partition(lambda: PIIPClassifier(config))
        self.pyramid, self.head = model.pyramid, model.head
        self.classifier_config = config
        self.post_init()


class PIIPModel(_WithHead):
    """A PIIP without classifier: the maps of all branches, and pooled features."""

    _keys_to_ignore_on_load_unexpected = [r"^head\.classifiers?\.", r"^merging\.", r"^feature_pyramid\."]

    def __init__(self, config: PIIPTransformersConfig) -> None:
        super().__init__(config)
        self._make(replace(config.classifier, num_classes=0))

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> PIIPModelOutput | tuple:
        """Maps and pooled features of images (B, 3, H, W), usually of side `config.image_size`."""
        states, hidden_states = self.states(pixel_values, output_hidden_states)
        pooled = self.head(head_inputs(self.classifier_config, states), pre_logits=True)
        return PIIPModelOutput(tuple(to_maps(states)), pooled, hidden_states)


class PIIPForImageClassification(_WithHead):
    """A PIIP classifier."""

    _keys_to_ignore_on_load_unexpected = [r"^merging\.", r"^feature_pyramid\."]

    def __init__(self, config: PIIPTransformersConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self._make(config.classifier)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple:
        """Class scores, and the loss where labels are given.

        Args:
            pixel_values: (B, 3, H, W), usually of side `config.image_size`.
            labels: (B,) class indices; (B, num_labels) for several labels per image, or values (B,) for one label (see
                `config.problem_type`).
            output_hidden_states: See `PIIPModelOutput.hidden_states`; None for what the configuration says.
            **kwargs: Handed to the loss.
        """
        states, hidden_states = self.states(pixel_values, output_hidden_states)
        logits = self.head(head_inputs(self.classifier_config, states))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        hidden = cast("Maps | None", hidden_states)  # a tuple of tuples: transformers' own models have one branch
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=hidden)


class PIIPBackbone(BackboneMixin, PIIPPreTrainedModel):
    """A `DensePIIP` as a backbone of transformers' detectors and segmentors, under the same names."""

    config_class = PIIPTransformersConfig
    config: PIIPTransformersConfig
    has_attentions = False
    _keys_to_ignore_on_load_unexpected = [r"^head\."]

    def __init__(self, config: PIIPTransformersConfig) -> None:
        super().__init__(config)
        model = build_then_partition(lambda: DensePIIP(config.dense))
        self.pyramid, self.merging, self.feature_pyramid = model.pyramid, model.merging, model.feature_pyramid
        self.num_features = list(model.out_dims)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BackboneOutput | tuple:
        """Maps (B, C_l, H_l, W_l) of images (B, 3, H, W), one for each of `out_features`.

        With `output_hidden_states` also those of all levels.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        with self.image(pixel_values) as image:
            levels = tuple(dense_maps(self.pyramid, self.merging, self.feature_pyramid, image))
        maps = tuple(x for stage, x in zip(self.stage_names, levels, strict=True) if stage in self.out_features)
        maps = cast(tuple[Tensor], maps)  # as it is declared there
        return BackboneOutput(feature_maps=maps, hidden_states=levels if output_hidden_states else None)


def build_then_partition(build: Callable[[], Module]) -> Module:
    """Builds a module whose construction writes into its own parameters.

    While transformers loads a model under ZeRO-3, every parameter is cut up and handed out to the processes as soon as
    the layer that owns it is made; whoever starts its weights later finds nothing there. What is built here is cut up
    when it is ready.

    Whether a model is being loaded, and how to stop the cutting meanwhile, only a module inside DeepSpeed says. Seen
    working with DeepSpeed 0.19.8.
    """
    if not is_deepspeed_zero3_enabled():
        return build()
    import deepspeed
    from deepspeed.runtime.zero import partition_parameters as zero

    if zero.top_level_context is None:  # not while a model is loaded: stays whole
        return build()
    zero.shutdown_init_context()
    try:
        module = build()
    finally:
        zero.restore_init_context()
    deepspeed.zero.Init(module=module, config_dict_or_path=deepspeed_config())
    return module
