"""Saves of what was trained alone: the projector of stage 1, and adapters with the parts trained beside them.

The folder holds `trained.json` (which parts, and where the frozen weights come from), the model's `config.json`, one
.safetensors per trained part with the names of the whole model, peft's two adapter files, and the processor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from piip_core.checkpoints import read_checkpoint, write_checkpoint
from piip_core.errors import CheckpointError
from piip_core.files import write_atomically

from .checkpointing import FINAL
from .parts import PARTS, part_modules, part_parameters

__all__ = [
    "ModelSource",
    "base_model",
    "is_trained_folder",
    "load_projector",
    "load_tensors",
    "read_note",
    "save_trained",
]

_NOTE = "trained.json"
_FORMAT = 1
_ADAPTER = "adapter_config.json"
# Of the language model, what another one would have to share to work with the same projector or adapters
_LANGUAGE_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
_PROJECTOR_FIELDS = ("projector_norm", "projector_num_groups", "projector_grid")
# Of a configuration, what says nothing about the network
_UNIMPORTANT = ("_name_or_path", "transformers_version", "dtype", "architectures", "attn_implementation")


@dataclass(frozen=True)
class ModelSource:
    """Where the weights of a model before training are, as `ModelArguments` has it."""

    model: str | None = None
    language_model: str | None = None
    pretrained_vision: bool = True


def base_model(model: nn.Module) -> nn.Module:
    """The model itself, without the wrapping of peft."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _prefix(model: nn.Module) -> str:
    """What peft puts in front of the names of the model's parameters."""
    return "base_model.model." if isinstance(model, PeftModel) else ""


def is_trained_folder(folder: str | Path) -> bool:
    """Whether a folder is a save of trained parts alone."""
    return (Path(folder) / _NOTE).is_file()


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
            folder / f"{part}.safetensors", {name: state[prefix + name] for name in _part_state(base, part)}
        )
    base.config.save_pretrained(folder)
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    if processor is not None:
        processor.save_pretrained(folder)
    with write_atomically(folder / _NOTE, "w") as file:
        json.dump({"format": _FORMAT, "parts": parts, "source": asdict(source)}, file, indent=2)


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
        with _gathered(list(own.values())):
            if keep:
                state |= {name: parameter.detach().cpu().clone() for name, parameter in own.items()}
    if keep:  # buffers are whole everywhere
        tensors = model.state_dict(keep_vars=True)
        state |= {n: t.detach().cpu() for n, t in tensors.items() if not isinstance(t, nn.Parameter)}
    return state


def read_note(folder: str | Path) -> tuple[list[str], ModelSource]:
    """What a save of trained parts says: its parts, and where the rest comes from.

    Raises:
        CheckpointError: If it is none, or of a later version.
    """
    file = Path(folder) / _NOTE
    if not file.is_file():
        raise CheckpointError(f"{folder}: has no {_NOTE}; expected the folder that a training stage saved, RUN/{FINAL}")
    try:
        note = json.loads(file.read_text())
        version, parts, source = note["format"], note["parts"], ModelSource(**note["source"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error!r}); save the stage again, or take another checkpoint"
        ) from None
    if version != _FORMAT or not set(parts) <= set(PARTS):
        raise CheckpointError(
            f"{file}: of format {version} with parts {parts}; this version reads {_FORMAT} with {PARTS}"
        )
    return parts, source


def load_tensors(model: nn.Module, folder: str | Path) -> None:
    """Loads what `save_trained` wrote, adapters included, into the model it was written from or one that equals it.

    Raises:
        CheckpointError: If the save does not fit the model; names what differs.
    """
    folder, base = Path(folder), base_model(model)
    parts, _ = read_note(folder)
    _check_fit(folder, base)
    for part in parts:
        _load_part(base, folder, part)
    if (folder / _ADAPTER).is_file() and isinstance(model, PeftModel):
        with _gathered(list(model.parameters())):
            set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))


def load_projector(model: nn.Module, folder: str | Path) -> None:
    """Starts the projector from that of an earlier stage.

    Args:
        model: The model.
        folder: What that stage saved, or the folder of its run.

    Raises:
        CheckpointError: If there is none, or it belongs to another vision tower or language model.
    """
    folder = Path(folder)
    folder = folder / FINAL if not is_trained_folder(folder) and is_trained_folder(folder / FINAL) else folder
    parts, _ = read_note(folder)
    if "projector" not in parts:
        raise CheckpointError(
            f"{folder}: holds {', '.join(parts) or 'adapters'} and no projector; expected the save of stage 1"
        )
    _check_fit(folder, base_model(model))
    _load_part(base_model(model), folder, "projector")


def _fully_trained(base: nn.Module) -> list[str]:
    """Parts whose every floating-point parameter is trained: not a language model with adapters."""
    return [
        part
        for part in PARTS
        if all(p.requires_grad for module in part_modules(base, part).values() for p in module.parameters())
    ]


def _part_state(base: nn.Module, part: str) -> dict[str, Tensor]:
    """Parameters and buffers of a part by their names in the model."""
    return {
        name: tensor
        for prefix, module in part_modules(base, part).items()
        for name, tensor in module.state_dict(prefix=f"{prefix}.", keep_vars=True).items()
    }


def _load_part(base: nn.Module, folder: Path, part: str) -> None:
    path = folder / f"{part}.safetensors"
    given = read_checkpoint(path).state
    own = _part_state(base, part)
    missing, unknown = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if missing or unknown:
        raise CheckpointError(
            f"{path}: does not fit the {part} of this model: it lacks {missing[:3] or 'nothing'} and has "
            f"{unknown[:3] or 'nothing'} beside; expected the save of the same row"
        )
    for name, tensor in given.items():
        target = own[name]
        shape = tuple(getattr(target, "ds_shape", target.shape))  # of a parameter that ZeRO-3 has partitioned
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(tensor.shape)}, this model has {shape}; expected the same row"
            )
        with _gathered([target]), torch.no_grad():
            target.copy_(tensor)


def _gathered(parameters: list[Tensor]) -> AbstractContextManager[Any]:
    """Makes parameters whole that ZeRO-3 has partitioned; what the first process writes into them reaches all."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def _check_fit(folder: Path, base: nn.Module) -> None:
    try:
        saved = type(base.config).from_pretrained(str(folder)).to_dict()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: cannot be read ({error}); take another checkpoint") from None
    own = base.config.to_dict()
    for what, first, second in (
        ("vision tower", saved["vision_config"], own["vision_config"]),
        ("projector", *({field: config[field] for field in _PROJECTOR_FIELDS} for config in (saved, own))),
        ("language model", *({field: c["text_config"].get(field) for field in _LANGUAGE_FIELDS} for c in (saved, own))),
    ):
        difference = next(_differences(first, second), None)
        if difference is not None:
            field, value, other = difference
            raise CheckpointError(
                f"{folder}: was trained with another {what}: {field} is {value!r} there and {other!r} in this model; "
                "expected the save of the same row and language model"
            )


def _differences(first: Any, second: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in sorted({*first, *second} - set(_UNIMPORTANT)):
            yield from _differences(first.get(key), second.get(key), f"{name}.{key}" if name else key)
    elif isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        for i, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from _differences(one, other, f"{name}[{i}]")
    elif first != second:
        yield name, first, second
