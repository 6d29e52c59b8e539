"""Loading what training saved: a whole model, trained parts alone, or adapters.

A save of trained parts has `trained.json` (which parts, and where the frozen weights come from), the model's
`config.json`, one .safetensors per trained part with the names of the whole model, peft's two adapter files, and the
processor.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
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

FINAL = "final"  # the trained model in the folder of a run, beside the checkpoints
PREFIXES = {
    "projector": ("model.multi_modal_projector.",),
    "language_model": ("model.language_model.", "lm_head."),
    "vision_tower": ("model.vision_tower.",),
    "interactions": ("model.vision_tower.pyramid.interactions.",),
}
PARTS = ("projector", "language_model", "vision_tower")  # that make up a model; interactions are a part of the tower
NOTE = "trained.json"
FORMAT = 1
_ADAPTER = "adapter_config.json"
# Of a configuration, what must be the same for another model to work with the same projector or adapters
_COMPARED = ("vision_config.", "projector_")
_COMPARED += tuple(f"text_config.{name}" for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"))
_UNIMPORTANT = ("_name_or_path", "transformers_version", "dtype", "architectures", "attn_implementation")


@dataclass(frozen=True)
class ModelSource:
    """Where the weights of a model before training are, as `ModelArguments` has it."""

    model: str | None = None
    language_model: str | None = None
    pretrained_vision: bool = True


def load_trained(folder: str | Path, source: ModelSource | None = None, **settings: Any) -> tuple[nn.Module, Any]:
    """Model and processor of a checkpoint, of the `final` folder of a run, or of a run, with settings of `build`.

    `source` says where the weights are that were not trained, if not where they were at the training.
    """
    folder = final_folder(folder)
    if not is_trained_folder(folder):
        return build(ModelSource(str(folder)), **settings)
    model, _ = build(source or read_note(folder)[1], **settings)
    if (folder / _ADAPTER).is_file():
        model = get_peft_model(model, load_part(PeftConfig, str(folder)))
    load_tensors(model, folder)
    return model.eval(), load_part(PIIPLlavaProcessor, folder)  # new adapters would drop out


def build(
    source: ModelSource, *, dtype: torch.dtype | str = torch.float32, bits: int = 16, **options: Any
) -> tuple[nn.Module, Any]:
    """Model and processor of a source: a whole model's folder, or one of the zoo to put together.

    The options are those of transformers' `from_pretrained`; `bits` is that of `quantization_config`.
    """
    options["dtype"] = dtype
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
    return load_part(PIIPLlavaForConditionalGeneration, folder, **options), load_part(PIIPLlavaProcessor, folder)


def quantization_config(bits: int, compute_dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig | None:
    """How to load the language model in 8 or 4 bits, everything else as it is; None for 16."""
    if bits == 16:
        return None
    if not is_bitsandbytes_available():
        raise ConfigError(f"bits={bits}: needs bitsandbytes, which is not installed: pip install 'piip[llava-qlora]'")
    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)
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


def part_parameters(model: nn.Module, part: str) -> dict[str, nn.Parameter]:
    """Parameters of a part by their names in the model, each once (the output layer may share the embedding)."""
    check_choice("part", part, tuple(PREFIXES))
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(PREFIXES[part])}


def part_state(model: nn.Module, part: str) -> dict[str, Tensor]:
    """Parameters and buffers of a part by their names in the model."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if name.startswith(PREFIXES[part])}


def read_note(folder: str | Path) -> tuple[list[str], ModelSource]:
    """What a save of trained parts says: its parts, and where the rest comes from."""
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
    if version != FORMAT or not set(parts) <= set(PREFIXES):
        raise CheckpointError(
            f"{file}: of format {version} with parts {parts}; this version reads {FORMAT} with {tuple(PREFIXES)}"
        )
    return parts, source


def load_tensors(model: nn.Module, folder: str | Path) -> None:
    """Loads what `save_trained` wrote, adapters included, into the model it was written from or one that equals it."""
    folder, base = Path(folder), base_model(model)
    parts, _ = read_note(folder)
    _check_fit(folder, base)
    for part in parts:
        _load_part(base, folder, part)
    if (folder / _ADAPTER).is_file() and isinstance(model, PeftModel):
        with gathered(list(model.parameters())):
            set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))


def load_projector(model: nn.Module, folder: str | Path) -> None:
    """Starts from the projector of an earlier stage, and what it trained of the vision tower: its save or its run."""
    folder = final_folder(folder)
    parts, _ = read_note(folder)
    if "projector" not in parts:
        raise CheckpointError(f"{folder}: holds {parts} and no projector; expected the save of stage 1")
    _check_fit(folder, base_model(model))
    for part in parts:
        if part != "language_model":
            _load_part(base_model(model), folder, part)


def _load_part(base: nn.Module, folder: Path, part: str) -> None:
    path = folder / f"{part}.safetensors"
    given = read_checkpoint(path).state
    own = part_state(base, part)
    missing, unknown = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if missing or unknown:
        raise CheckpointError(
            f"{path}: does not fit the {part} of this model: it lacks {missing[:3] or 'nothing'} and has "
            f"{unknown[:3] or 'nothing'} beside; expected the save of the same model"
        )
    for name, tensor in given.items():
        target = own[name]
        shape = tuple(getattr(target, "ds_shape", target.shape))  # of a parameter that ZeRO-3 has partitioned
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(tensor.shape)}, this one has {shape}; expected the save of the same model"
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
    saved, own = (_flat(config.to_dict()) for config in (load_part(type(base.config), str(folder)), base.config))
    for name in sorted({*saved, *own}):
        if name.startswith(_COMPARED) and saved.get(name) != own.get(name):
            raise CheckpointError(
                f"{folder}: was trained with another model: {name} is {saved.get(name)!r} there and {own.get(name)!r} "
                "in this one; expected the save of the same model"
            )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Values of a configuration by their names, such as "vision_config.pyramid.branches.0.image_size"."""
    if not isinstance(value, (Mapping, list, tuple)):
        return {name.removeprefix("."): value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    found = {}
    for key, item in items:
        if key not in _UNIMPORTANT:
            found |= _flat(item, f"{name}.{key}")
    return found
