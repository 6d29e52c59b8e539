"""Configurations of the vision tower and of the whole model, in transformers' manner."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from piip_core import PIIPConfig, zoo
from piip_core.errors import ConfigError, check

DEFAULT_ROW = "piip_llava_clip_bl_512_256_7b"


@strict
class PIIPVisionConfig(PreTrainedConfig):
    """A PIIP without merging, as the vision tower of a multimodal model.

    Args:
        pyramid: `PIIPConfig.to_dict()` with `merging` None; None for that of the smallest published model.
        feature_block: For a single branch: the block behind which the features are taken, from 0 (LLaVA-1.5 leaves the
            last of CLIP-L's 24 out: 22). None for the last.
        max_pixels: Most pixels of an image that goes in at its own aspect ratio; every branch sees it shrunk as it
            sees a square one. None for squares of `image_size`.
    """

    model_type = "piip_vision"
    base_config_key = "vision_config"

    pyramid: dict[str, Any] | None = None
    feature_block: int | None = None
    max_pixels: int | None = None

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
        least = self.size_multiple**2
        fits = self.max_pixels is None or self.max_pixels >= least
        check(fits, "PIIPVisionConfig.max_pixels", self.max_pixels, f"None, or {least} or more for this pyramid")

    @property
    def piip(self) -> PIIPConfig:
        """The pyramid."""
        return PIIPConfig.from_dict(self.pyramid)

    @property
    def image_size(self) -> int:
        """Side of the square image that goes in, that of the branch with the largest one."""
        piip = self.piip
        return piip.branches[piip.largest_image - 1].image_size

    def cell(self, number: int) -> Fraction:
        """Side in pixels of the largest image of what a cell of a branch's final map stands for."""
        branch = self.piip.branches[number - 1]
        return Fraction(branch.network.strides[-1] * self.image_size, branch.image_size)

    @property
    def size_multiple(self) -> int:
        """What the sides of an image at its own aspect ratio are a multiple of: all branches have whole cells then."""
        return math.lcm(*(self.cell(number).numerator for number in range(1, len(self.piip.branches) + 1)))

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
        projector_grid: Side of the grid of visual tokens; None for that of `projector_branch`.
        projector_branch: Number of the branch whose grid carries the visual tokens; None for the last.
        projector_merge: Side of the squares of cells of that grid that become one visual token each.
        projector_merge_by: "average" or "shuffle"; see `TokenMerging`.
        projector_newline: End every row of visual tokens with one more, which is learned, for language models that
            count positions in one dimension.
        projector_deep: Interactions (from 0) whose maps become more visual tokens, with projectors of their own. Those
            of the first are added to the language model's states after its first layer, of the next after its second,
            and so on (DeepStack).
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
    projector_branch: int | None = None
    projector_merge: int = 1
    projector_merge_by: Literal["average", "shuffle"] = "shuffle"
    projector_newline: bool = False
    projector_deep: list[int] | tuple[int, ...] = ()
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

        if self.projector_deep:
            count, layers = self.vision_config.piip.num_interactions, self.text_config.num_hidden_layers
            fits = all(0 <= k < count for k in self.projector_deep) and len(self.projector_deep) < layers
            expected = f"interactions from 0 to {count - 1}, fewer than the {layers} layers of the language model"
            check(fits, "projector_deep", self.projector_deep, expected)
        if self.vision_config.max_pixels is not None:
            check(self.projector_grid is None, "projector_grid", self.projector_grid, "None with max_pixels")
            check(self.token_size > 0, "max_pixels", self.vision_config.max_pixels, "None: tokens of uneven sizes")

    @property
    def token_size(self) -> int:
        """Side in pixels of the square that a visual token stands for; 0 if that is no whole number."""
        branch = self.projector_branch or len(self.vision_config.piip.branches)
        size = self.vision_config.cell(branch) * self.projector_merge
        return size.numerator if size.denominator == 1 else 0

    @property
    def size_multiple(self) -> int:
        """What the sides of an image at its own aspect ratio are a multiple of: its tokens are whole squares then."""
        return math.lcm(self.vision_config.size_multiple, self.token_size)

    @property
    def image_seq_length(self) -> int:
        """Visual tokens per image, with `max_pixels` those of a square one of `vision_config.image_size`."""
        vision, branch = self.vision_config, self.projector_branch or 0
        chosen = vision.piip.branches[branch - 1]
        side = (self.projector_grid or chosen.image_size // chosen.network.strides[-1]) // self.projector_merge
        return side * (side + self.projector_newline)

    def image_lengths(self, pixel_values: Sequence[Any], image_sizes: Iterable[Iterable[int]] | None) -> list[int]:
        """Visual tokens of each image; see `PIIPLlavaModel.get_image_features`."""
        if image_sizes is None:
            return [self.image_seq_length] * len(pixel_values)
        return count_tokens(image_sizes, self.token_size, self.projector_newline)


def count_tokens(image_sizes: Iterable[Iterable[int]], token_size: int, newline: bool) -> list[int]:
    """Visual tokens of images of these heights and widths, if each stands for a square of so many pixels."""
    return [int(height) // token_size * (int(width) // token_size + newline) for height, width in image_sizes]
