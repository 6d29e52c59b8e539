"""Configurations of the vision tower and of the whole model, in transformers' manner."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from piip_core import PIIPConfig, zoo
from piip_core.errors import ConfigError

DEFAULT_ROW = "piip_llava_clip_bl_512_256_7b"


@strict
class PIIPVisionConfig(PreTrainedConfig):
    """A PIIP without merging, as the vision tower of a multimodal model.

    Args:
        pyramid: `PIIPConfig.to_dict()` with `merging` None; None for that of the smallest published model.
        feature_block: For a single branch: the block behind which the features are taken, from 0 (LLaVA-1.5 leaves the
            last of CLIP-L's 24 out: 22). None for the last.
    """

    model_type = "piip_vision"
    base_config_key = "vision_config"

    pyramid: dict[str, Any] | None = None
    feature_block: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.pyramid is None:
            self.pyramid = zoo.multimodal(DEFAULT_ROW).vision.to_dict()
        piip = self.piip
        if piip.merging is not None:
            raise ConfigError("PIIPVisionConfig.pyramid: merging is set, expected None (the projector merges)")
        if self.feature_block is not None:
            depth = piip.branches[0].network.depth
            if len(piip.branches) > 1 or not 0 <= self.feature_block < depth:
                raise ConfigError(
                    f"PIIPVisionConfig.feature_block={self.feature_block}: expected None for several branches, or one "
                    f"of the blocks 0 to {depth - 1} of a single one"
                )

    @property
    def piip(self) -> PIIPConfig:
        """The pyramid."""
        return PIIPConfig.from_dict(self.pyramid)

    @property
    def image_size(self) -> int:
        """Side of the square image that goes in, that of the branch with the largest one."""
        piip = self.piip
        return piip.branches[piip.largest_image - 1].image_size

    @property
    def grid(self) -> int:
        """Side of the last branch's feature map."""
        last = self.piip.branches[-1]
        return last.image_size // last.network.strides[-1]

    @property
    def hidden_size(self) -> int:
        """Width of Branch 1."""
        return self.piip.branches[0].network.dims[-1]


@strict
class PIIPLlavaConfig(PreTrainedConfig):
    """A language model with a PIIP vision tower.

    Args:
        vision_config: The vision tower.
        text_config: The language model, of any class that `AutoModel` knows.
        image_token_index: Id that stands for one visual token in `input_ids`. It needs no row in the embedding table.
        projector_norm: Norm inside the projectors; see `piip_core.merging.TokenMerging`.
        projector_num_groups: Groups of the group norm.
        projector_grid: Side of the grid of visual tokens; None for that of the last branch.
    """

    model_type = "piip_llava"
    attribute_map: ClassVar[dict[str, str]] = {"image_token_id": "image_token_index"}
    sub_configs: ClassVar[dict[str, type]] = {"vision_config": PIIPVisionConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_index: int = 32000
    projector_norm: Literal["group", "layer", "none"] = "group"
    projector_num_groups: int = 32
    projector_grid: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # Later versions of transformers would do this, but not 5.19
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = PIIPVisionConfig(**(self.vision_config or {}))
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**{"model_type": "llama", **(self.text_config or {})})
        super().__post_init__(**kwargs)
        # As in transformers' LlavaConfig: language models say it in their own configuration
        if self.text_config.tie_word_embeddings:
            self.tie_word_embeddings = True

    @property
    def image_seq_length(self) -> int:
        """Visual tokens per image."""
        return (self.projector_grid or self.vision_config.grid) ** 2
