"""Saves of what was trained alone: the projector of stage 1, and adapters with the parts trained beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from piip_core.checkpoints import write_checkpoint
from piip_core.files import write_atomically

from ..loading import FORMAT, NOTE, PARTS, ModelSource, base_model, gathered, part_parameters, part_state

__all__ = ["gathered_state", "save_trained"]


def _prefix(model: nn.Module) -> str:
    """What peft puts in front of the names of the model's parameters."""
    return "base_model.model." if isinstance(model, PeftModel) else ""


def save_trained(
    model: nn.Module,
    folder: str | Path,
    source: ModelSource,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    processor: Any = None,
) -> None:
    """Writes the parts that were trained, the projector in any case, and the adapters if the model has any.

    Args:
        model: The model, or peft's around it.
        folder: Where to; made if missing.
        source: Where the rest comes from.
        state_dict: Its weights, gathered from all processes; None takes them from the model.
        processor: Saved beside it.
    """
    folder, base = Path(folder), base_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state_dict is None else state_dict
    prefix = _prefix(model)
    parts = ["projector", *(part for part in _fully_trained(base) if part != "projector")]
    for part in parts:
        write_checkpoint(
            folder / f"{part}.safetensors", {name: state[prefix + name] for name in part_state(base, part)}
        )
    base.config.save_pretrained(folder)
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    if processor is not None:
        processor.save_pretrained(folder)
    with write_atomically(folder / NOTE, "w") as file:
        json.dump({"format": FORMAT, "parts": parts, "source": asdict(source)}, file, indent=2)


def gathered_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """What `save_trained` needs of a model that ZeRO-3 has partitioned; all processes must call it.

    Args:
        model: The model, or peft's around it.
        keep: Whether this process gets it; the others get nothing.
    """
    # a frozen projector may have come from an earlier stage, so it is saved too
    projector = {id(parameter) for parameter in part_parameters(base_model(model), "projector").values()}
    state = {}
    for prefix, module in model.named_modules():  # one by one: the whole may not fit into the memory of a device
        own = dict(module.named_parameters(prefix, recurse=False))
        own = {name: p for name, p in own.items() if p.requires_grad or id(p) in projector}
        with gathered(list(own.values())):
            if keep:
                state |= {name: parameter.detach().cpu().clone() for name, parameter in own.items()}
    if keep:  # buffers are whole everywhere
        tensors = model.state_dict(keep_vars=True)
        state |= {n: t.detach().cpu() for n, t in tensors.items() if not isinstance(t, nn.Parameter)}
    return state


def _fully_trained(base: nn.Module) -> list[str]:
    """Parts whose every parameter is trained: not a language model with adapters."""
    return [part for part in PARTS if all(p.requires_grad for p in part_parameters(base, part).values())]
