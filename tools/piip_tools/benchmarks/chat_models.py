"""The two models that are compared: published ones with random weights, or trained ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llava_piip.assembly import assemble_config, join
from llava_piip.image_processing import PIIPImageProcessor
from llava_piip.inference import ChatModel
from llava_piip.modeling import PIIPLlavaForConditionalGeneration, PIIPVisionModel
from piip_core import BranchConfig, ConvNeXtConfig, PIIPConfig, ViTConfig, zoo
from piip_core.errors import ConfigError

# Architecture of the language models that the published models name
LANGUAGE_MODELS: Mapping[str, Mapping[str, int]] = {
    "lmsys/vicuna-7b-v1.5": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ),
    "lmsys/vicuna-13b-v1.5": dict(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000
    ),
}
_CONTEXT_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class TimedModel:
    """One of the models.

    Attributes:
        name: What the results call it.
        model: In evaluation mode.
        image_processor: Makes its pixel values.
    """

    name: str
    model: PIIPLlavaForConditionalGeneration
    image_processor: Any


def published_names() -> list[str]:
    """The published models that can be compared with a baseline."""
    return [entry.name for entry in zoo.multimodal_entries() if entry.feature_block is None]


def build_pair(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    divide_widths: int = 1,
    projector_grid: int | None = None,
    language: bool = True,
) -> tuple[TimedModel, TimedModel]:
    """A published model and the LLaVA-1.5 of its size, with random weights and one language model for both.

    Args:
        name: Out of `published_names`.
        device: Of the models.
        dtype: Of the models.
        divide_widths: Makes both narrower by this factor: branches, interactions (with heads as wide as before),
            language model and its vocabulary. Image sizes, numbers of tokens, depths, and shares of the matrix products
            stay.
        projector_grid: Height and width of the grid of visual tokens of the first one; None for the published grid.
        language: False leaves the layers of the language model out, for the vision encoders alone.

    Raises:
        ConfigError: For an unknown name, a baseline, or widths that cannot be divided.
    """
    entry = zoo.multimodal(name)
    if entry.feature_block is not None:
        raise ConfigError(f"{name!r} is a baseline: expected one of {', '.join(published_names())}")
    baseline = next(
        other
        for other in zoo.multimodal_entries()
        if other.feature_block is not None and other.language_model == entry.language_model
    )
    text_config = _language_model(entry.language_model, divide_widths, layers=None if language else 0)
    models = []
    with torch.device(device):
        decoder = AutoModelForCausalLM.from_config(text_config, dtype=dtype, trust_remote_code=False)
        for one, grid in ((entry, projector_grid), (baseline, None)):
            narrow = dataclasses.replace(one, vision=_narrower(one.vision, divide_widths))
            config = assemble_config(narrow, text_config, image_token_id=text_config.vocab_size, projector_grid=grid)
            tower = PIIPVisionModel(config.vision_config).to(dtype=dtype)
            title = f"{one.title} {one.resolution}" + (f", widths / {divide_widths}" if divide_widths > 1 else "")
            processor = PIIPImageProcessor(size=config.vision_config.image_size)
            models.append(TimedModel(name=title, model=join(config, tower, decoder), image_processor=processor))
    return models[0], models[1]


def load_pair(
    model: Path, baseline: Path, *, device: str | None = None, dtype: str | torch.dtype = "auto"
) -> list[TimedModel]:
    """Two trained or converted models, each with its own language model.

    Raises:
        UserError: As `ChatModel.load`.
    """
    folders = model, baseline
    chats = [ChatModel.load(folder, device=device, dtype=dtype) for folder in folders]
    return [
        TimedModel(name=folder.resolve().name, model=chat.model, image_processor=chat.processor.image_processor)
        for folder, chat in zip(folders, chats, strict=True)
    ]


def _language_model(name: str, divisor: int, *, layers: int | None) -> LlamaConfig:
    sizes = dict(LANGUAGE_MODELS[name])
    for field in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        sizes[field] = _divided(f"{name} {field}", sizes[field], divisor)
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    return LlamaConfig(**sizes, max_position_embeddings=_CONTEXT_LENGTH)


def _narrower(vision: PIIPConfig, divisor: int) -> PIIPConfig:
    heads = _divided("interaction heads", vision.interaction.num_heads, divisor)
    branches = tuple(_narrower_branch(branch, divisor) for branch in vision.branches)
    interaction = dataclasses.replace(vision.interaction, num_heads=heads)
    return dataclasses.replace(vision, branches=branches, interaction=interaction)


def _narrower_branch(branch: BranchConfig, divisor: int) -> BranchConfig:
    network = branch.network
    if isinstance(network, ConvNeXtConfig):
        widths = {"stage_dims": tuple(_divided("stage_dims", width, divisor) for width in network.stage_dims)}
    elif isinstance(network, ViTConfig):
        widths = {name: _divided(name, getattr(network, name), divisor) for name in ("embed_dim", "num_heads")}
    else:
        raise ConfigError(f"a branch of type {type(network).__name__} cannot be made narrower")
    return dataclasses.replace(branch, network=dataclasses.replace(network, **widths))


def _divided(name: str, value: int, divisor: int) -> int:
    if divisor < 1 or value % divisor:
        raise ConfigError(f"divide_widths={divisor}: expected 1 or more and a divisor of {value} ({name})")
    return value // divisor
