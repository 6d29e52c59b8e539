"""The model and processor that a run starts from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import set_seed
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from piip_core.errors import CheckpointError, ConfigError

from ..assembly import assemble
from ..modeling import PIIPLlavaForConditionalGeneration
from ..processing import PIIPLlavaProcessor
from .arguments import ModelArguments, PIIPTrainingArguments
from .checkpointing import FINAL, RunFolder
from .lora import add_adapters, quantization_config
from .parts import freeze_except
from .saving import ModelSource, is_trained_folder, load_projector, load_tensors, read_note

__all__ = ["build_for_training", "load_trained"]


def build_for_training(model: ModelArguments, training: PIIPTrainingArguments) -> tuple[nn.Module, Any, ModelSource]:
    """Model, processor and their source, with the right parameters trainable and adapters added.

    Raises:
        UserError: If row, language model, projector or adapters do not fit one another.
    """
    if not (model.pretrained_vision or "vision_tower" in training.train_parts or Path(model.model).is_dir()):
        raise ConfigError(
            f"pretrained_vision=False: expected 'vision_tower' among train_parts={training.train_parts}, because what "
            "starts at random and is not trained is not saved either"
        )
    source = ModelSource(_absolute(model.model), _absolute(model.language_model), model.pretrained_vision)
    half = training.bf16 and (training.deepspeed is not None or "language_model" not in training.train_parts)
    settings = {"attn_implementation": model.attn_implementation, "dtype": torch.bfloat16 if half else torch.float32}
    if is_deepspeed_zero3_enabled() and not Path(source.model).is_dir():
        network, processor = _build_partitioned(source, training, **settings)
    else:
        network, processor = _build(source, bits=training.bits, **settings)
    if model.projector is not None:
        load_projector(network, model.projector)
    if training.lora:
        set_seed(training.seed)  # adapters start alike, however the model came about
        network = add_adapters(network, training)
    else:
        freeze_except(network, training.train_parts)
    if half and training.deepspeed is None:
        # what learns is kept in full precision; DeepSpeed keeps such a copy itself
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return network, processor, source


def load_trained(folder: str | Path, source: ModelSource | None = None, **settings: Any) -> tuple[nn.Module, Any]:
    """Gives back the model and processor that a run saved: a whole model, trained parts, or adapters.

    Args:
        folder: A checkpoint or the `final` folder of a run, or the run.
        source: Where the weights are that were not trained, if not where they were at the training.
        **settings: `dtype` ("auto": that of the file), `attn_implementation`, `bits`, `device_map`.

    Raises:
        CheckpointError: If the folder holds none of them, or does not fit what it was trained from.
    """
    folder = Path(folder)
    folder = folder / FINAL if (folder / FINAL).is_dir() else folder
    if not is_trained_folder(folder):
        return _build(ModelSource(str(folder)), **settings)
    model, _ = _build(source or read_note(folder)[1], **settings)
    if (folder / "adapter_config.json").is_file():
        model = get_peft_model(model, PeftConfig.from_pretrained(str(folder)))
    load_tensors(model, folder)
    return model.eval(), _load_processor(folder)  # new adapters would drop out


def _absolute(name: str | None) -> str | None:
    """Folders so that they are found from anywhere; other names as they are."""
    return str(Path(name).resolve()) if name is not None and Path(name).is_dir() else name


def _build(
    source: ModelSource,
    *,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str | None = None,
    bits: int = 16,
    device_map: dict[str, torch.device] | None = None,
) -> tuple[nn.Module, Any]:
    options = {"dtype": dtype, "attn_implementation": attn_implementation, "device_map": device_map}
    options["quantization_config"] = quantization_config(bits, torch.bfloat16 if dtype == "auto" else dtype)
    folder = Path(source.model)
    if not folder.is_dir():
        return assemble(
            source.model, language_model=source.language_model, pretrained_vision=source.pretrained_vision, **options
        )
    folder = folder / FINAL if (folder / FINAL).is_dir() else folder
    if is_trained_folder(folder):
        raise CheckpointError(
            f"model {folder}: holds trained parts and no whole model. To go on from its projector, give the row as "
            f"--model and this folder as --projector; `python -m llava_piip.train.merge` makes a whole model of it"
        )
    model = PIIPLlavaForConditionalGeneration.from_pretrained(folder, **options)
    return model, _load_processor(folder)


def _build_partitioned(source: ModelSource, training: PIIPTrainingArguments, **settings: Any) -> tuple[nn.Module, Any]:
    """A new model of a row under ZeRO-3, where no process holds the whole of it for long.

    One process puts it together and writes it aside; from there all of them load it, tensor by tensor, into the pieces
    they keep.
    """
    folder, state = Path(training.output_dir) / RunFolder.STAGING / "assembled", PartialState()
    if training.should_save:
        unset_hf_deepspeed_config()
        try:
            model, processor = _build(source, **settings)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        finally:
            set_hf_deepspeed_config(training.hf_deepspeed_config)
        del model
    state.wait_for_everyone()
    built = _build(ModelSource(str(folder)), **settings)
    state.wait_for_everyone()
    if training.should_save:
        shutil.rmtree(folder)
    return built


def _load_processor(folder: Path) -> Any:
    return PIIPLlavaProcessor.from_pretrained(folder)
