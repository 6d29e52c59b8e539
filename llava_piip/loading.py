"""Loading what training saved: a whole model, trained parts alone, or adapters.

A save of trained parts has `trained.json` (which parts, and where the frozen weights come from), the model's
`config.json`, one .safetensors per trained part with the names of the whole model, peft's two adapter files, and the
processor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import is_bitsandbytes_available

from piip_core.checkpoints import read_checkpoint
from piip_core.errors import CheckpointError, ConfigError, check_choice
from piip_core.files import read_json

from .assembly import assemble, load_part
from .modeling import PIIPLlavaForConditionalGeneration
from .processing import PIIPLlavaProcessor

__all__ = [
    "FINAL",
    "PARTS",
    "ModelSource",
    "base_model",
    "build",
    "final_folder",
    "is_trained_folder",
    "load_projector",
    "load_tensors",
    "load_trained",
    "part_modules",
    "part_parameters",
    "quantization_config",
    "read_note",
]

FINAL = "final"  # the trained model in the folder of a run, beside the checkpoints
PARTS = ("projector", "language_model", "vision_tower")
NOTE = "trained.json"
FORMAT = 1
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


def load_trained(folder: str | Path, source: ModelSource | None = None, **settings: Any) -> tuple[nn.Module, Any]:
    """Gives back the model and processor that a run saved: a whole model, trained parts, or adapters.

    Args:
        folder: A checkpoint or the `final` folder of a run, or the run.
        source: Where the weights are that were not trained, if not where they were at the training.
        **settings: `dtype` ("auto": that of the file), `attn_implementation`, `bits`, `device_map`.

    Raises:
        CheckpointError: If the folder holds none of them, or does not fit what it was trained from.
    """
    folder = final_folder(folder)
    if not is_trained_folder(folder):
        return build(ModelSource(str(folder)), **settings)
    model, _ = build(source or read_note(folder)[1], **settings)
    if (folder / "adapter_config.json").is_file():
        model = get_peft_model(model, _load(PeftConfig, str(folder)))
    load_tensors(model, folder)
    return model.eval(), _load(PIIPLlavaProcessor, folder)  # new adapters would drop out


def build(
    source: ModelSource,
    *,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str | None = None,
    bits: int = 16,
    device_map: dict[str, torch.device] | None = None,
) -> tuple[nn.Module, Any]:
    """Model and processor of a source: a whole model's folder, or a row to put together.

    Args:
        source: Where the weights are.
        dtype: Precision; "auto" for that of the file.
        attn_implementation: As transformers' `from_pretrained` takes it.
        bits: See `quantization_config`.
        device_map: As transformers' `from_pretrained` takes it.

    Raises:
        UserError: If they cannot be loaded.
    """
    options = {"dtype": dtype, "attn_implementation": attn_implementation, "device_map": device_map}
    options["quantization_config"] = quantization_config(bits, torch.bfloat16 if dtype == "auto" else dtype)
    folder = Path(source.model)
    if not folder.is_dir():
        return assemble(
            source.model, language_model=source.language_model, pretrained_vision=source.pretrained_vision, **options
        )
    folder = final_folder(folder)
    if is_trained_folder(folder):
        raise CheckpointError(
            f"model {folder}: holds trained parts and no whole model. To go on from its projector, give the row as "
            f"--model and this folder as --projector; `python -m llava_piip.train.merge` makes a whole model of it"
        )
    return _load(PIIPLlavaForConditionalGeneration, folder, **options), _load(PIIPLlavaProcessor, folder)


def _load(kind: Any, folder: Path, **options: Any) -> Any:
    return load_part(kind, folder, "a complete save", **options)


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


def base_model(model: nn.Module) -> nn.Module:
    """The model itself, without the wrapping of peft."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def final_folder(folder: str | Path) -> Path:
    """The folder of the trained model, if this is that of a run; otherwise itself."""
    folder = Path(folder)
    return folder / FINAL if (folder / FINAL).is_dir() else folder


def is_trained_folder(folder: str | Path) -> bool:
    """Whether a folder is a save of trained parts alone."""
    return (Path(folder) / NOTE).is_file()


def part_modules(model: nn.Module, part: str) -> dict[str, nn.Module]:
    """Modules that make up a part of a model in the layout of transformers' Llava, by their names in it.

    Raises:
        ConfigError: If there is no such part.
    """
    check_choice("part", part, PARTS)
    names = {
        "projector": ["model.multi_modal_projector"],
        "language_model": ["model.language_model", "lm_head"],
        "vision_tower": ["model.vision_tower"],
    }
    return {name: model.get_submodule(name) for name in names[part]}


def part_parameters(model: nn.Module, part: str) -> dict[str, nn.Parameter]:
    """Parameters of a part by their names in the model, each once (the output layer may share the embedding)."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in part_modules(model, part).items():
        for name, parameter in module.named_parameters(prefix=prefix):
            found.setdefault(id(parameter), (name, parameter))
    return dict(found.values())


def read_note(folder: str | Path) -> tuple[list[str], ModelSource]:
    """What a save of trained parts says: its parts, and where the rest comes from.

    Raises:
        CheckpointError: If it is none, or of a later version.
    """
    file = Path(folder) / NOTE
    if not file.is_file():
        raise CheckpointError(f"{folder}: has no {NOTE}; expected the folder that a training stage saved, RUN/{FINAL}")
    try:
        note = read_json(file, CheckpointError)
        version, parts, source = note["format"], note["parts"], ModelSource(**note["source"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error!r}); save the stage again, or take another checkpoint"
        ) from None
    if version != FORMAT or not set(parts) <= set(PARTS):
        raise CheckpointError(
            f"{file}: of format {version} with parts {parts}; this version reads {FORMAT} with {PARTS}"
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
        with gathered(list(model.parameters())):
            set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))


def load_projector(model: nn.Module, folder: str | Path) -> None:
    """Starts the projector from that of an earlier stage.

    Args:
        model: The model.
        folder: What that stage saved, or the folder of its run.

    Raises:
        CheckpointError: If there is none, or it belongs to another vision tower or language model.
    """
    folder = final_folder(folder)
    parts, _ = read_note(folder)
    if "projector" not in parts:
        raise CheckpointError(
            f"{folder}: holds {', '.join(parts) or 'adapters'} and no projector; expected the save of stage 1"
        )
    _check_fit(folder, base_model(model))
    _load_part(base_model(model), folder, "projector")


def part_state(base: nn.Module, part: str) -> dict[str, Tensor]:
    """Parameters and buffers of a part by their names in the model."""
    return {
        name: tensor
        for prefix, module in part_modules(base, part).items()
        for name, tensor in module.state_dict(prefix=f"{prefix}.", keep_vars=True).items()
    }


def _load_part(base: nn.Module, folder: Path, part: str) -> None:
    path = folder / f"{part}.safetensors"
    given = read_checkpoint(path).state
    own = part_state(base, part)
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
        with gathered([target]), torch.no_grad():
            target.copy_(tensor)


def gathered(parameters: list[Tensor]) -> AbstractContextManager[Any]:
    """Makes parameters whole that ZeRO-3 has partitioned; what the first process writes into them reaches all."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def _check_fit(folder: Path, base: nn.Module) -> None:
    saved, own = _load(type(base.config), str(folder)).to_dict(), base.config.to_dict()
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
