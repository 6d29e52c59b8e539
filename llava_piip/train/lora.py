"""Adapters on the language model (LoRA), also on a quantised one (QLoRA), through peft."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from piip_core.errors import ConfigError

from .arguments import PIIPTrainingArguments
from .parts import freeze_except

__all__ = ["add_adapters", "language_model_linears"]


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
