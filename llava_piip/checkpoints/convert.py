"""Whole folders: a published checkpoint to one that `from_pretrained` loads, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

from piip_core import BranchConfig, ConvNeXtConfig, PIIPConfig, zoo
from piip_core.checkpoints import ConversionReport, read_checkpoint, write_checkpoint
from piip_core.checkpoints.branch_names import default_branch_class
from piip_core.checkpoints.names import projector_rules
from piip_core.checkpoints.public_config import config_from_public
from piip_core.checkpoints.rules import RuleTable
from piip_core.errors import CheckpointError
from piip_core.files import publish_folder, read_json, write_atomically
from piip_core.meta import on_meta

from ..assembly import add_image_token, assemble_processor, load_part
from ..configuration import PIIPLlavaConfig, PIIPVisionConfig
from ..modeling import PIIPLlavaForConditionalGeneration
from .names import PUBLISHED_PROJECTOR, PUBLISHED_TOWER, LlavaNames
from .public_config import published_vision_config
from .recognise import recognise_row

__all__ = ["Conversion", "convert_folder", "export_folder", "load_published_projector"]

_NORMS = {"gn": "group", "ln": "layer"}
# Fields of a published config.json that belong to LLaVA, not to the language model
_LLAVA_FIELDS = ("mm_", "image_", "vision_tower_", "tokenizer_", "tune_", "freeze_", "use_mm_", "output_dir")


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        report: What happened to every key.
        model: What the folder was taken for, in words.
        path: The folder that was written.
    """

    report: ConversionReport
    model: str
    path: Path


@dataclass(frozen=True)
class _Vision:
    """What a published folder says of its vision tower."""

    config: PIIPConfig
    projector_norm: str
    projector_grid: int | None
    origin: str


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
    shapes = file.state.shapes()
    vision = _vision(shapes, row, vision_config, clip_configs or {})
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
    names = LlavaNames.of_published(shapes, vision.config, vision.projector_norm)
    state, report = names.to_ours(file.state, model_shapes(config), source=str(source))
    report.check()
    with publish_folder(target, overwrite=overwrite) as aside:
        config.save_pretrained(aside)
        _generation_config(source, config).save_pretrained(aside)
        assemble_processor(config, tokenizer).save_pretrained(aside)
        write_checkpoint(aside / "model.safetensors", state, description={"branch_classes": names.branch_classes})
    return Conversion(report, vision.origin, target)


def export_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    branch_classes: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Writes the weights of one of our folders in the published names; the reverse of `convert_folder`.

    Args:
        source: Folder of a model of ours.
        target: Folder to write.
        branch_classes: Published class of each branch; None for those of the model it was converted from, or, for a
            model that was not, "clip" for CLIP and "convnext_timm" for ConvNeXt.
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
    classes = branch_classes or (file.description or {}).get("branch_classes") or map(_class_of, vision.branches)
    names = LlavaNames(vision, tuple(classes), config.projector_norm)
    state, report = names.to_published(file.state, source=str(source))
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
    table = RuleTable(projector_rules(num_branches, projector_norm))
    file = read_checkpoint(path)
    report = ConversionReport(source=str(path))
    found: dict[str, Tensor] = {}
    for key, tensor in file.state.items():
        ours = table.to_ours(key.removeprefix(PUBLISHED_PROJECTOR))
        if ours is None:
            report.unexplained.append(key)
        else:
            found[ours[0]] = tensor
            report.used[key] = ours[0]
    names = [rule.ours.replace("*", part) for rule in table.rules for part in ("weight", "bias")]
    report.missing = [name for name in names if name not in found]
    report.check()
    return found


def model_shapes(config: PIIPLlavaConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor of a model, without allocating it."""
    with on_meta():
        model = PIIPLlavaForConditionalGeneration(config)
    tied = set(model.all_tied_weights_keys)
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}


def _vision(
    shapes: Mapping[str, tuple[int, ...]],
    row: str | None,
    vision_config: str | os.PathLike[str] | None,
    clip_configs: Mapping[str, Mapping[str, Any]],
) -> _Vision:
    if row is not None or vision_config is None:
        entry = zoo.multimodal(row) if row is not None else recognise_row(shapes)
        origin = "the row that was named" if row is not None else f"recognised as {entry.name}"
        return _Vision(entry.vision, entry.projector_norm, None, origin)
    public = published_vision_config(Path(vision_config))
    tower = {key.removeprefix(PUBLISHED_TOWER): s for key, s in shapes.items() if key.startswith(PUBLISHED_TOWER)}
    backbone = {
        key: value | {"clip_config": clip_configs[value["pretrained"]]}
        if isinstance(value, Mapping) and value.get("pretrained") in clip_configs
        else value
        for key, value in public["backbone"].items()
    }
    projector = public["projector"]
    norm = projector.get("norm", "gn")
    if norm not in _NORMS:
        raise CheckpointError(f"{vision_config}: projector norm {norm!r}, expected one of {', '.join(_NORMS)}")
    config = config_from_public(backbone, tower, merging=False).config
    return _Vision(config, _NORMS[norm], projector.get("out_shape"), f"the vision configuration {vision_config}")


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
