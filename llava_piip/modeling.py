"""PIIP-LLaVA: a language model that sees through a PIIP (paper section III-D), built on transformers' LLaVA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaModelOutputWithPast,
    LlavaPreTrainedModel,
)
from transformers.utils import can_return_tuple

from piip_core import PIIP
from piip_core.errors import UserError
from piip_core.integrations.transformers import PIIPPreTrainedModel
from piip_core.integrations.transformers.card import PushWithCard
from piip_core.integrations.transformers.modeling import PIIPModelOutput, build_then_partition
from piip_core.merging import TokenMerging
from piip_core.pyramid import to_maps

from .configuration import PIIPLlavaConfig, PIIPVisionConfig


class PIIPVisionModel(PIIPPreTrainedModel):
    """A PIIP as transformers' model; its weights are below `pyramid.`."""

    config_class = PIIPVisionConfig
    config: PIIPVisionConfig

    def __init__(self, config: PIIPVisionConfig) -> None:
        super().__init__(config)
        self.pyramid = build_then_partition(lambda: PIIP(config.piip))
        if config.max_pixels is not None:
            # The next larger numbers: 22 * (7 / 11) is 13.999999999999998, which would lose a row of 14
            self.pyramid.factors = [min(math.nextafter(factor, 2.0), 1.0) for factor in self.pyramid.factors]
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> PIIPModelOutput | tuple:
        """Feature maps of a batch of images (B, 3, H, W), by default squares of `config.image_size`."""
        if self.config.feature_block is None:
            states, hidden_states = self.states(pixel_values, output_hidden_states)
            return PIIPModelOutput(tuple(to_maps(states)), hidden_states=hidden_states)
        with self.image(pixel_values) as image:
            maps = tuple(self.pyramid.forward_blocks(image, [self.config.feature_block]))
        return PIIPModelOutput(maps, hidden_states=(maps,) if output_hidden_states else None)


class Projector(TokenMerging):
    """The visual tokens of a model, and side by side with each what is added to it in the language model.

    Attributes:
        deep: The projectors for that, one for each of `config.projector_deep`. New ones add nothing until trained.
    """

    def __init__(self, config: PIIPLlavaConfig) -> None:
        pyramid, width = config.vision_config.piip, config.text_config.hidden_size
        options = dict(
            norm=config.projector_norm,
            num_groups=config.projector_num_groups,
            grid_branch=config.projector_branch,
            merge=config.projector_merge,
            merge_by=config.projector_merge_by,
            newline=config.projector_newline,
        )
        super().__init__(pyramid.dims_after(None), width, grid=config.projector_grid, **options)
        self.deep = nn.ModuleList(TokenMerging(pyramid.dims_after(k), width, **options) for k in config.projector_deep)
        for merging in self.deep:
            ends = [] if merging.newline is None else [merging.newline]
            for projection in merging.projections.values():
                ends += projection.linear_2.parameters()
            for parameter in ends:
                nn.init.zeros_(parameter)

    def forward(self, maps: Sequence[Tensor], between: Sequence[Sequence[Tensor]] = ()) -> Tensor:
        """Final maps of all branches, and those after each deep interaction, to (B, tokens, width * (1 + deep))."""
        tokens, size = super().forward(maps), self.grid_size(maps)
        deep = [merging(found, size) for merging, found in zip(self.deep, between, strict=True)]
        return torch.cat((tokens, *deep), dim=-1) if deep else tokens


def _add_deep(index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Hook before a layer of the language model, which adds what belongs to the states after the one before it."""
    deep = kwargs.pop("deep_visual", ())
    if 0 < index <= len(deep):
        states, *others = args
        args = (states + deep[index - 1].to(states.device), *others)
    return args, kwargs


class PIIPLlavaModel(LlavaModel):
    """Vision tower, projectors and decoder, without the language modelling head."""

    config_class = PIIPLlavaConfig
    config: PIIPLlavaConfig

    def __init__(self, config: PIIPLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.image_size = config.vision_config.image_size
        self.vision_tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        self.multi_modal_projector = Projector(config)
        self.set_language_model(AutoModel.from_config(config.text_config, trust_remote_code=False))
        self.post_init()

    def set_language_model(self, language_model: nn.Module) -> None:
        """Makes it the decoder of this model."""
        self.language_model = language_model
        # For good, since checkpointing may run layers again; what they add comes as an argument and leaves no trace
        for index, layer in enumerate(language_model.layers if self.config.projector_deep else ()):
            layer.register_forward_pre_hook(partial(_add_deep, index), with_kwargs=True)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple:
        """Visual tokens of images.

        Args:
            pixel_values: (N, 3, S, S), or (N, 3, H, W) where the configuration has `max_pixels`.
            image_sizes: There, heights and widths (N, 2) of images that are padded at the bottom and right; None for
                images that are not. Those of one size run together.
            **kwargs: `output_hidden_states`, see `PIIPModelOutput.hidden_states`; by default what the vision tower's
                configuration says. Others are accepted as transformers passes them on, but not used.

        Returns:
            With `pooler_output`, a tuple of N tensors (tokens of the image, hidden size), and `last_hidden_state`, the
            final tokens of Branch 1 (N, tokens, width). Of images of several sizes these are a tuple, too, and there
            are no hidden states. Tokens are wider by what `projector_deep` adds to them; see `Projector`.
        """
        self._check_images(pixel_values, image_sizes)
        # No parameter of its own: what is one here `generate` keeps from the language model
        asked = kwargs.get("output_hidden_states")
        if self.config.vision_config.max_pixels is None:
            return self._encode(pixel_values, asked)
        sizes = [pixel_values.shape[2:]] * len(pixel_values) if image_sizes is None else image_sizes.tolist()
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, size in enumerate(sizes):
            groups.setdefault(tuple(size), []).append(index)
        missing = self._most_runs(len(groups)) - len(groups)  # before the first run, as with text alone
        tokens, states = {}, {}
        for (height, width), indices in groups.items():
            images = pixel_values if len(groups) == 1 else pixel_values[indices]
            seen = self._encode(images[:, :, :height, :width], asked)
            tokens |= zip(indices, seen.pooler_output, strict=True)
            states |= zip(indices, seen.last_hidden_state, strict=True)
        if len(groups) > 1:
            tokens, states = (tuple(found[i] for i in range(len(found))) for found in (tokens, states))
            seen = BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=tokens)
        if missing:
            first, *others = seen.pooler_output
            seen.pooler_output = (first + self._run_vision_without_effect(missing), *others)
        return seen

    def _check_images(self, pixel_values: Tensor, image_sizes: Tensor | None) -> None:
        """Refuses images that the model's processor would not make."""
        shape, sides = tuple(pixel_values.shape), (self.image_size,) * 2
        if self.config.vision_config.max_pixels is None:
            if image_sizes is not None or len(shape) != 4 or shape[1:] != (3, *sides):
                raise UserError(
                    f"pixel_values of shape {shape}: expected (number of images, 3, {sides[0]}, {sides[1]}) and no "
                    "image_sizes, as the model's processor makes them"
                )
            return
        multiple = self.config.size_multiple
        sizes = [list(shape[2:])] if image_sizes is None else image_sizes.tolist()
        fits = len(shape) == 4 and shape[1] == 3 and (image_sizes is None or len(sizes) == len(pixel_values))
        fits = fits and all(
            0 < side <= most and side % multiple == 0
            for size in sizes
            for side, most in zip(size, shape[2:], strict=True)
        )
        if not fits:
            raise UserError(
                f"pixel_values of shape {shape} with image_sizes {sizes}: expected (number of images, 3, H, W) and for "
                f"each image its height and width, multiples of {multiple}, as the model's processor makes them"
            )

    def _encode(self, pixel_values: Tensor, output_hidden_states: bool | None) -> BaseModelOutputWithPooling:
        """Images of one size."""
        deep = self.config.projector_deep
        if output_hidden_states is None:
            output_hidden_states = self.vision_tower.config.output_hidden_states
        seen = self.vision_tower(
            pixel_values, output_hidden_states=output_hidden_states or bool(deep), return_dict=True
        )
        between = [seen.hidden_states[k] for k in deep]
        return BaseModelOutputWithPooling(
            last_hidden_state=seen.feature_maps[0].flatten(2).transpose(1, 2),
            pooler_output=tuple(self.multi_modal_projector(seen.feature_maps, between)),
            hidden_states=seen.hidden_states if output_hidden_states else None,
        )

    def _most_runs(self, runs: int) -> int:
        """The most runs of the tower in any process: under ZeRO-3 all of them have to gather its weights as often."""
        if not is_deepspeed_zero3_enabled() or self.config.vision_config.max_pixels is None:
            return runs
        most = torch.tensor(runs, device=self.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        image_sizes: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast | tuple:
        """Runs the decoder over text with the visual tokens at their placeholders.

        Args:
            input_ids: (B, N) int64; each image is as many times `config.image_token_id` as it has visual tokens.
            pixel_values: (number of images, 3, S, S), in the order of the placeholders; None for text alone.
            image_sizes: See `get_image_features`.
            inputs_embeds: (B, N, hidden size) instead of `input_ids`, with visual tokens already in it.
            mm_encoder_outputs: What `get_image_features` returned, under "image", instead of `pixel_values`.
            **kwargs: As for the language model: attention mask, positions, cache ...

        Returns:
            As transformers' `LlavaModel`, with what `get_image_features` gave in the field that it has for images.

        Raises:
            UserError: If placeholders and images do not match in number.
            ValueError: If not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        encoded = (mm_encoder_outputs or {}).get("image")
        if encoded is None and pixel_values is not None:
            asked = kwargs.get("output_hidden_states")
            encoded = self.get_image_features(pixel_values, image_sizes, output_hidden_states=asked, return_dict=True)
        features = None if encoded is None else torch.cat(tuple(encoded.pooler_output))
        # Before the embedding, as with images: processes must come to each gradient in the same order
        must_run = features is None and (self.training or is_deepspeed_zero3_enabled())
        zero = self._run_vision_without_effect(max(self._most_runs(0), 1)) if must_run else None
        if inputs_embeds is None:
            tokens, *deep = (None,) if features is None else features.split(self.config.text_config.hidden_size, dim=1)
            inputs_embeds = self._embed(input_ids, tokens)
            if deep:
                is_image, zeros = self._is_image(input_ids), torch.zeros_like(inputs_embeds)
                kwargs["deep_visual"] = [zeros.masked_scatter(is_image, found.to(zeros)) for found in deep]
        elif features is not None:
            raise UserError(
                "inputs_embeds together with images: give input_ids, or put the visual tokens into the embeds"
            )
        if zero is not None:
            inputs_embeds = inputs_embeds + zero
        outputs = super().forward(inputs_embeds=inputs_embeds, return_dict=True, **kwargs)
        if features is not None:
            # transformers 5.24 renamed the field and put more into it
            if hasattr(outputs, "image_outputs"):
                outputs["image_outputs"] = encoded
            else:
                outputs["image_hidden_states"] = features
        return outputs

    def _embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Embeddings of the text, with the visual tokens of images, or of a part of one, at their placeholders."""
        is_image = self._is_image(input_ids)
        # The image token has no row of its own: any other stands in
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image.squeeze(-1), 0))
        if features is None and input_ids.shape[1] == 1:
            return embeds  # a step of generation: spares the check, which waits for the device
        if not torch.compiler.is_compiling():
            found, needed = int(is_image.sum()), 0 if features is None else len(features)
            if found != needed:
                raise UserError(
                    f"input_ids have {found} placeholders for visual tokens, the given images need {needed}: make both "
                    "with the model's processor, and cut neither"
                )
        if features is None:
            return embeds
        return embeds.masked_scatter(is_image, features.to(embeds.device, embeds.dtype))

    def _is_image(self, input_ids: Tensor) -> Tensor:
        return (input_ids == self.config.image_token_id).unsqueeze(-1)

    def _run_vision_without_effect(self, runs: int) -> Tensor:
        """Zero, as a sum over no visual token of a black image, so that all processes take the same steps.

        Every parameter of tower and projectors gets a gradient, zero.
        """
        # No parameter is looked up by name: under ZeRO-3 that gathers it, for which processes with images do not wait
        side = self.image_size if self.config.vision_config.max_pixels is None else self.config.size_multiple
        black = torch.zeros(1, 3, side, side, device=self.device)
        return sum(self._encode(black, False).pooler_output[0][:0].sum() for _ in range(runs))


class PIIPLlavaForConditionalGeneration(PushWithCard, LlavaForConditionalGeneration):
    """PIIP-LLaVA with its language modelling head: training, generation, `from_pretrained`, `save_pretrained`."""

    config_class = PIIPLlavaConfig
    config: PIIPLlavaConfig

    def __init__(self, config: PIIPLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = PIIPLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @wraps(PIIPLlavaModel.get_image_features)
    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling | tuple:
        """See `PIIPLlavaModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    @wraps(LlavaForConditionalGeneration.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(
        self, *args: Any, mm_encoder_outputs: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, which drops images for assistants (5.16: for all): they go with their placeholders."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        ids = inputs["input_ids"]
        if ids is None or (ids.shape[1] > 1 and (ids == self.config.image_token_id).any()):
            inputs["mm_encoder_outputs"] = mm_encoder_outputs
        return inputs
