"""The model as vLLM runs it: our vision tower and projectors, vLLM's language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder, LlavaForConditionalGeneration
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageSize
from vllm.multimodal.processing import BaseMultiModalProcessor, BaseProcessingInfo, PromptReplacement

from llava_piip.configuration import PIIPLlavaConfig
from llava_piip.modeling import PIIPVisionModel, Projector


class PIIPLlavaProcessingInfo(BaseProcessingInfo):
    """What vLLM asks of a model before it has any request: every image takes the same number of tokens."""

    def get_hf_config(self) -> PIIPLlavaConfig:
        """The model's configuration."""
        return self.ctx.get_hf_config(PIIPLlavaConfig)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images."""
        return {"image": None}

    def get_image_size_with_most_features(self) -> ImageSize:
        """The size of dummy images, which needs no resizing."""
        side = self.get_hf_config().vision_config.image_size
        return ImageSize(width=side, height=side)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Spares vLLM finding it out with dummy images."""
        return {"image": self.get_hf_config().image_seq_length}


class PIIPLlavaMultiModalProcessor(BaseMultiModalProcessor[PIIPLlavaProcessingInfo]):
    """Pixels of images, and the tokens that stand for them. The text is the renderer's."""

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        image_processor = self.info.get_hf_processor().image_processor
        try:
            data = self.info.ctx.call_hf_processor(image_processor, hf_data, hf_kwargs)
        except ValueError as error:  # vLLM's text lists the data, and not what is wrong with it
            raise VLLMValidationError(str(error.__cause__ or error)) from error
        size = self.info.get_hf_config().vision_config.image_size
        if data["pixel_values"].shape[1:] != (3, size, size):  # a request can set `mm_processor_kwargs`
            raise VLLMValidationError(
                f"images of shape {tuple(data['pixel_values'].shape[1:])}: expected (3, {size}, {size}); leave `size` "
                "out of mm_processor_kwargs"
            )
        return data

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(self, *args: Any, **kwargs: Any) -> list[PromptReplacement]:
        config = self.info.get_hf_config()
        token = config.image_token_index
        # Never an id without a row: `prompt_logprobs` looks it up in the logits and would end the engine for everybody
        placeholder = token if token < config.text_config.vocab_size else 0
        return [PromptReplacement("image", target=[token], replacement=[placeholder] * config.image_seq_length)]


@MULTIMODAL_REGISTRY.register_processor(
    PIIPLlavaMultiModalProcessor, info=PIIPLlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PIIPLlavaForVLLM(LlavaForConditionalGeneration):
    """vLLM's LLaVA with another vision tower: names of weights, forward pass and language model are those of LLaVA.

    The tower runs whole on every device of a tensor-parallel group: it is the smaller part.
    """

    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)  # not LLaVA's, which builds a tower that it knows
        self.config: PIIPLlavaConfig = vllm_config.model_config.hf_config
        self.multimodal_config = vllm_config.model_config.multimodal_config
        text_config = self.config.text_config
        self.configure_mm_token_handling(
            vocab_size=text_config.vocab_size, mm_token_ids=[self.config.image_token_index]
        )
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_tower = PIIPVisionModel(self.config.vision_config)
            self.multi_modal_projector = Projector(self.config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config, hf_config=text_config, prefix=maybe_prefix(prefix, "language_model")
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: Any) -> Tensor | list[Tensor]:
        """Visual tokens (images, image_seq_length, hidden size) of `pixel_values` (images, 3, S, S)."""
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:
            return []
        return self.multi_modal_projector(self.vision_tower(pixel_values).feature_maps)

    def embed_input_ids(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As of every multimodal model; ids that may have no row in the table stand for row 0, as in our own model.

        The image token of Llama lies outside the table: an id too many would end the engine for everybody.
        """
        outside = (input_ids >= self.config.text_config.vocab_size) | (input_ids == self.config.image_token_index)
        return super().embed_input_ids(input_ids.masked_fill(outside, 0), *args, **kwargs)
