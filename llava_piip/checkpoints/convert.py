"""Whole folders: a published checkpoint to one that `from_pretrained` loads, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

from piip_core import BranchConfig, ConvNeXtConfig, zoo
from piip_core.checkpoints import (
    Conversion,
    read_checkpoint,
    to_ours,
    to_published,
    write_checkpoint,
)
from piip_core.checkpoints.branch_names import default_branch_class
from piip_core.checkpoints.names import projector_rules
from piip_core.checkpoints.released import keep_converted
from piip_core.errors import CheckpointError
from piip_core.files import publish_folder, read_json, write_atomically

from ..assembly import add_image_token, assemble_processor, load_part
from ..configuration import PIIPLlavaConfig, PIIPVisionConfig
from ..modeling import PIIPLlavaForConditionalGeneration
from .names import LlavaNames, ProjectorNames
from .vision_config import find_vision

# Fields of a published config.json that belong to LLaVA, not to the language model
_LLAVA_FIELDS = ("mm_", "image_", "vision_tower_", "tokenizer_", "tune_", "freeze_", "use_mm_", "output_dir")


def convert_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    row: str | None = None,
    vision_config: str | os.PathLike[str] | None = None,
    clip_configs: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Converts a published PIIP-LLaVA folder; the target appears once it is complete.

    Weights are read and written a tensor at a time, shard by shard, in the types they have.

    Args:
        source: Folder with `config.json`, weights (sharded or not) and tokenizer files.
        target: Folder to write, for `from_pretrained`.
        row: Name of the row. None takes `vision_config`, or recognises the row by the shapes.
        vision_config: The published vision configuration, a Python file that is read without being run.
        clip_configs: For a vision configuration of CLIP models that were never released: transformers' configuration
            of each by name.
        overwrite: Replace a folder that exists.

    Raises:
        CheckpointError: If the source is not complete, is not recognised or does not fit, or the target exists.
        NotSupportedYet: If the vision configuration has parts that this version does not know.
    """
    source, target = Path(source), Path(target)
    fields = read_json(source / "config.json", CheckpointError)
    file = read_checkpoint(source, verify=True)
    vision = find_vision(file.state.shapes(), row, vision_config, clip_configs or {})
    tokenizer = add_image_token(_tokenizer(source))
    config = PIIPLlavaConfig(
        vision_config=PIIPVisionConfig(pyramid=vision.config.to_dict()),
        text_config=_text_config(fields),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projector_norm=vision.projector_norm,
        projector_grid=vision.projector_grid,
        dtype=fields.get("torch_dtype") or fields.get("dtype"),
        architectures=[PIIPLlavaForConditionalGeneration.__name__],
    )
    names = LlavaNames.of_published(file.state, config)
    state, report = to_ours(file.state, names, source=str(source))
    report.check()
    with publish_folder(target, overwrite=overwrite) as aside:
        config.save_pretrained(aside)
        _generation_config(source, config).save_pretrained(aside)
        assemble_processor(config, tokenizer).save_pretrained(aside)
        write_checkpoint(aside / "model.safetensors", state, description={"branch_classes": names.branch_classes})
    return Conversion(report, vision.origin, target)


def fetch_released(name: str) -> Path:
    """The folder of a released PIIP-LLaVA for `from_pretrained`, downloaded and converted at the first call.

    Where it is kept, and what is checked: `piip_core.checkpoints.released.keep_converted`.

    Raises:
        ConfigError: For an unknown name; the message lists the closest ones.
        CheckpointError: If it cannot be fetched, is another one than expected, or is no such model.
    """
    released = zoo.released(name)
    if released.file is not None:
        raise CheckpointError(f"{name}: is no chat model; expected one of those that begin with piip_llava_")

    def convert(source: Path, target: Path) -> Path:
        return convert_folder(source, target, row=released.entry.name, overwrite=True).path

    return keep_converted(released, "model", convert)


def export_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Conversion:
    """Writes the weights of one of our folders in the published names; the reverse of `convert_folder`.

    Branches are published in the classes of the model that the folder was converted from, or, for a model that was not,
    as "clip" for CLIP and "convnext_timm" for ConvNeXt.

    Args:
        source: Folder of a model of ours.
        target: Folder to write.
        overwrite: Replace a folder that exists.

    Raises:
        CheckpointError: If the source is not complete, or the target exists.
    """
    source, target = Path(source), Path(target)
    config = load_part(PIIPLlavaConfig, source, "the folder of a model of ours")
    vision = config.vision_config.piip
    if len(vision.branches) < 2:
        raise CheckpointError(f"{source}: a model with a single branch has no published layout of its own")
    file = read_checkpoint(source, verify=True)
    classes = (file.description or {}).get("branch_classes") or map(_class_of, vision.branches)
    state, report = to_published(file.state, LlavaNames.of(config, classes), source=str(source))
    report.check()
    with publish_folder(target, overwrite=overwrite) as aside:
        write_checkpoint(aside / "model.safetensors", state)
        with write_atomically(aside / "config.json", "w") as out:
            json.dump(config.text_config.to_dict() | {"model_type": "llava_llama"}, out, indent=2, default=str)
    return Conversion(report, "the configuration in the folder", target)


def load_published_projector(
    path: str | os.PathLike[str], num_branches: int, projector_norm: str = "group"
) -> dict[str, Tensor]:
    """Projector weights of the published first stage (`mm_projector.bin`), in the names of `TokenMerging`.

    Raises:
        CheckpointError: If a key has no explanation or one is missing.
    """
    names = ProjectorNames(None, rules=projector_rules(num_branches, projector_norm))
    found, report = to_ours(read_checkpoint(path).state, names, source=str(path))
    report.check()
    return found


def _text_config(fields: Mapping[str, Any]) -> LlamaConfig:
    kept = {
        key: value
        for key, value in fields.items()
        if not key.startswith(_LLAVA_FIELDS) and key not in ("architectures", "model_type", "_name_or_path", "auto_map")
    }
    try:
        return LlamaConfig(**kept, architectures=["LlamaForCausalLM"])
    except (TypeError, ValueError, RecursionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"config.json: not the configuration of a published model ({reason})") from None


def _tokenizer(source: Path) -> Any:
    settings = source / "tokenizer_config.json"
    # The transformers that made these folders took a missing setting for True, today's takes it for False
    legacy = {} if not settings.is_file() or "legacy" in read_json(settings, CheckpointError) else {"legacy": True}
    return load_part(AutoTokenizer, source, "tokenizer.model and tokenizer_config.json beside the weights", **legacy)


def _generation_config(source: Path, config: PIIPLlavaConfig) -> GenerationConfig:
    if (source / "generation_config.json").is_file():
        return GenerationConfig.from_dict(read_json(source / "generation_config.json", CheckpointError))
    return GenerationConfig.from_model_config(config.text_config)


def _class_of(branch: BranchConfig) -> str:
    return "convnext_timm" if isinstance(branch.network, ConvNeXtConfig) else default_branch_class(branch)
