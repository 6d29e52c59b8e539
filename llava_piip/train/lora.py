"""Adapters on the language model (LoRA), also on a quantised one (QLoRA), through peft."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from piip_core.errors import ConfigError

from .arguments import PIIPTrainingArguments
from .parts import freeze_except

__all__ = ["add_adapters", "language_model_linears", "quantization_config"]


def quantization_config(bits: int, compute_dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig | None:
    """How to load the language model in 8 or 4 bits, everything else as it is; None for 16.

    Raises:
        ConfigError: If bitsandbytes is not installed.
    """
    if bits == 16:
        return None
    if not is_bitsandbytes_available():
        raise ConfigError(f"bits={bits}: needs bitsandbytes, which is not installed: pip install 'piip[llava-qlora]'")
    kept = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=kept,
    )


def language_model_linears(model: nn.Module, target: list[str] | None = None) -> list[str]:
    """Full names of the linear layers inside the language model; the output layer is not among them.

    Args:
        model: The model.
        target: Last components of the names to choose, such as "q_proj"; none chooses all.

    Raises:
        ConfigError: If a name of `target` is not there.
    """
    prefix = "model.language_model"
    found = [
        name
        for name, module in model.get_submodule(prefix).named_modules(prefix=prefix)
        if isinstance(module, nn.Linear)
    ]
    last = {name: name.rpartition(".")[2] for name in found}
    for name in target or []:
        if name not in last.values():
            known = ", ".join(sorted(set(last.values())))
            raise ConfigError(
                f"lora_target={name!r}: no such linear layer in the language model; expected any of {known}"
            )
    return [name for name in found if not target or last[name] in target]


def add_adapters(model: nn.Module, arguments: PIIPTrainingArguments) -> PeftModel:
    """Puts adapters on the language model, trained together with the parts that `arguments` name.

    Raises:
        ConfigError: If a layer to adapt does not exist.
    """
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
