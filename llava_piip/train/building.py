"""The model and processor that a run starts from: what of it is trained, and adapters (LoRA, QLoRA) through peft."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import set_seed
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from piip_core.errors import check
from piip_core.training_checkpoints import RunFolder

from ..loading import ModelSource, build, load_projector, part_parameters
from .arguments import ModelArguments, PIIPTrainingArguments


def build_for_training(model: ModelArguments, training: PIIPTrainingArguments) -> tuple[nn.Module, Any, ModelSource]:
    """Model, processor and their source, with the right parameters trainable and adapters added."""
    check(
        model.pretrained_vision or "vision_tower" in training.train_parts or Path(model.model).is_dir(),
        "pretrained_vision",
        model.pretrained_vision,
        f"'vision_tower' among train_parts={training.train_parts}, because what starts at random and is not trained "
        "is not saved either",
    )
    source = ModelSource(_absolute(model.model), _absolute(model.language_model), model.pretrained_vision)
    half = training.bf16 and (training.deepspeed is not None or "language_model" not in training.train_parts)
    settings = {"attn_implementation": model.attn_implementation, "dtype": torch.bfloat16 if half else torch.float32}
    if is_deepspeed_zero3_enabled() and not Path(source.model).is_dir():
        network, processor = _build_partitioned(source, training, **settings)
    else:
        network, processor = build(source, bits=training.bits, **settings)
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


def _absolute(name: str | None) -> str | None:
    """Folders so that they are found from anywhere; other names as they are."""
    return str(Path(name).resolve()) if name is not None and Path(name).is_dir() else name


def _build_partitioned(source: ModelSource, training: PIIPTrainingArguments, **settings: Any) -> tuple[nn.Module, Any]:
    """A new model of a row under ZeRO-3, where no process holds the whole of it for long.

    One process puts it together and writes it aside; from there all of them load it, tensor by tensor, into the pieces
    they keep.
    """
    folder, state = Path(training.output_dir) / RunFolder.STAGING / "assembled", PartialState()
    if training.should_save:
        unset_hf_deepspeed_config()
        try:
            model, processor = build(source, **settings)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        finally:
            set_hf_deepspeed_config(training.hf_deepspeed_config)
        del model
    state.wait_for_everyone()
    built = build(ModelSource(str(folder)), **settings)
    state.wait_for_everyone()
    if training.should_save:
        shutil.rmtree(folder)
    return built


def freeze_except(model: nn.Module, parts: Iterable[str]) -> None:
    """Makes the parameters of the named parts trainable, and no others."""
    chosen = {part: part_parameters(model, part) for part in parts}
    model.requires_grad_(False)
    for part, parameters in chosen.items():
        check(bool(parameters), "train_parts", part, "parts that the model has")
        for parameter in parameters.values():
            parameter.requires_grad_(True)


def language_model_linears(model: nn.Module, target: Iterable[str] = ()) -> list[str]:
    """Full names of the linear layers inside the language model; the output layer is not among them."""
    named = model.get_submodule("model.language_model").named_modules(prefix="model.language_model")
    last = {name: name.rpartition(".")[2] for name, module in named if isinstance(module, nn.Linear)}
    for name in target:
        known = f"any of {', '.join(sorted(set(last.values())))}, linear layers of the language model"
        check(name in last.values(), "lora_target", name, known)
    return [name for name in last if not target or last[name] in target]


def add_adapters(model: nn.Module, arguments: PIIPTrainingArguments) -> PeftModel:
    """Puts adapters on the language model, trained together with the parts that `arguments` name."""
    config = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=language_model_linears(model, arguments.lora_target),
        bias="none",
        task_type="CAUSAL_LM",
    )
    if arguments.bits < 16:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=arguments.activation_checkpointing,
            gradient_checkpointing_kwargs=arguments.activation_checkpointing_kwargs,
        )
    freeze_except(model, arguments.train_parts)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapted = get_peft_model(model, config)  # freezes what it finds
    for parameter in trained:
        parameter.requires_grad_(True)
    return adapted
