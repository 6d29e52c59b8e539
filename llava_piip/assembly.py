"""New models from their parts: a vision tower, a language model by name, fresh projectors."""

from __future__ import annotations

import copy
import logging
import os
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from piip_core import zoo
from piip_core.checkpoints import load_pretrained, load_pyramid, read_checkpoint
from piip_core.errors import CheckpointError, ConfigError, UserError
from piip_core.meta import on_meta

from .configuration import PIIPLlavaConfig, PIIPVisionConfig
from .conversation import IMAGE_TAG
from .image_processing import PIIPImageProcessor
from .modeling import PIIPLlavaForConditionalGeneration, PIIPVisionModel, Projector
from .processing import PIIPLlavaProcessor

_LANGUAGE_MODEL = "the name of a model on the Hugging Face hub, or a folder with config.json, weights and tokenizer"

logger = logging.getLogger(__name__)


def assemble(
    entry: zoo.MultimodalEntry | str,
    *,
    language_model: str | os.PathLike[str] | None = None,
    pretrained_vision: bool = True,
    vision_checkpoint: str | os.PathLike[str] | None = None,
    projector_grid: int | None = None,
    **options: Any,
) -> tuple[PIIPLlavaForConditionalGeneration, PIIPLlavaProcessor]:
    """Builds a model as training starts from it, with its processor.

    Args:
        entry: A published model or its name: vision tower, projectors, and which language model.
        language_model: Another one that is built like Llama or Qwen: a name on the hub or a folder.
        pretrained_vision: Load the weights that the branches name; False starts them at random.
        vision_checkpoint: A trained model with the same pyramid, such as a classifier, to start from instead: branches
            and interactions, see `load_pyramid`.
        projector_grid: Side of the grid of visual tokens; None for that of the last branch.
        **options: For `AutoModelForCausalLM.from_pretrained`: dtype, attn_implementation, quantization_config ...

    Raises:
        ConfigError: For an unknown name, or a language model that cannot be used.
        CheckpointError: If weights or language model cannot be had, or do not fit.
    """
    if isinstance(entry, str):
        entry = zoo.multimodal(entry)
    source = os.fspath(language_model or entry.language_model)
    tokenizer = add_image_token(load_part(AutoTokenizer, source, _LANGUAGE_MODEL))
    decoder = load_part(AutoModelForCausalLM, source, _LANGUAGE_MODEL, **options)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TAG)
    config = assemble_config(entry, decoder.config, image_token_id=image_token_id, projector_grid=projector_grid)
    tower = PIIPVisionModel(config.vision_config)
    if vision_checkpoint is not None:
        path = os.fspath(vision_checkpoint)
        logger.info(load_pyramid(tower.pyramid, read_checkpoint(path).state, source=path).summary())
    elif pretrained_vision:
        load_pretrained(tower.pyramid)
    rows = decoder.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id >= rows:  # batches look it up like any other token, though nothing attends to it
        raise ConfigError(
            f"language_model: the padding token {tokenizer.pad_token!r} has the id {tokenizer.pad_token_id}, and the "
            f"embedding has {rows} rows: set tokenizer.pad_token to one that has a row, such as "
            f"{tokenizer.eos_token!r}, and save the tokenizer"
        )
    processor = assemble_processor(config, tokenizer, chat_template=entry.chat_template, **entry.images)
    return join(config, tower.to(decoder.dtype), decoder), processor


def assemble_config(
    entry: zoo.MultimodalEntry,
    text_config: PreTrainedConfig,
    *,
    image_token_id: int,
    projector_grid: int | None = None,
) -> PIIPLlavaConfig:
    """The configuration of a model of the zoo around another language model."""
    return PIIPLlavaConfig(
        vision_config=PIIPVisionConfig(
            pyramid=entry.vision.to_dict(), feature_block=entry.feature_block, max_pixels=entry.max_pixels
        ),
        text_config=copy.deepcopy(text_config),
        image_token_index=image_token_id,
        projector_norm=entry.projector_norm,
        projector_grid=projector_grid,
        **entry.options,
    )


def assemble_processor(
    config: PIIPLlavaConfig, tokenizer: PreTrainedTokenizerBase, *, chat_template: str | None = None, **images: Any
) -> PIIPLlavaProcessor:
    """The processor for a configuration, with the chat template of the second stage and settings of images."""
    vision = config.vision_config
    if vision.max_pixels is not None:
        images |= {"max_pixels": vision.max_pixels, "size_multiple": config.size_multiple}
    return PIIPLlavaProcessor(
        PIIPImageProcessor(size=vision.image_size, **images),
        tokenizer,
        chat_template=chat_template,
        image_seq_length=config.image_seq_length,
        token_size=config.token_size if vision.max_pixels else None,
        image_newline=config.projector_newline,
    )


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Gives a tokenizer the special token `<image>`, and a padding token if it has none.

    The image token takes the next free id. Embedding tables need no row for it.
    """
    if IMAGE_TAG not in tokenizer.get_added_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TAG, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        # Padding never counts: attention masks and labels are made by length
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_part(kind: Any, source: str | os.PathLike[str], expected: str = "a complete save", **options: Any) -> Any:
    """What `from_pretrained` of a class makes of a folder or name; never by running Python files that lie there.

    Raises:
        CheckpointError: If it cannot be loaded; says what was `expected`.
    """
    try:
        # Said at every call: left out, transformers asks at the terminal, and one "y" runs the code
        return kind.from_pretrained(source, trust_remote_code=False, **options)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as cause:  # of many types, bare Exception from tokenizers among them
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise CheckpointError(f"{source}: cannot be loaded ({reason}): expected {expected}") from cause


def join(
    config: PIIPLlavaConfig, tower: PIIPVisionModel, decoder: PreTrainedModel
) -> PIIPLlavaForConditionalGeneration:
    """One model around parts that have their weights; only the projectors are made anew.

    Args:
        config: Of the whole.
        tower: The vision tower; it goes to the device of the language model.
        decoder: The language model. Several models can share one.

    Raises:
        ConfigError: If the language model is not built like Llama or Qwen.
    """
    head = decoder.get_output_embeddings()
    like_llama = hasattr(decoder.get_decoder(), "embed_tokens") and isinstance(head, nn.Linear) and head.bias is None
    if not like_llama:
        raise ConfigError(
            f"language_model: {type(decoder).__name__} is not built like Llama or Qwen, which is expected"
        )
    with on_meta():
        model = PIIPLlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.multi_modal_projector = Projector(config).to(device=decoder.device, dtype=decoder.dtype)
    model.model.set_language_model(decoder.get_decoder())
    model.lm_head = head
    model.config.text_config = decoder.config  # its attention is chosen where it is loaded
    tower.to(decoder.device)
    if decoder.generation_config is not None:
        model.generation_config = GenerationConfig.from_dict(decoder.generation_config.to_dict())
    return model.eval()
