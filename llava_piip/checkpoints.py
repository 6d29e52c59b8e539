"""Published PIIP-LLaVA checkpoints to our layout and back: whole folders, names of weights, vision configurations."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

from piip_core import ConvNeXtConfig, PIIPConfig, zoo
from piip_core.checkpoints import (
    Conversion,
    PublishedNames,
    read_checkpoint,
    to_ours,
    to_published,
    write_checkpoint,
)
from piip_core.checkpoints.branch_names import branch_classes_of, default_branch_class
from piip_core.checkpoints.names import NameMap, projector_rules
from piip_core.checkpoints.public_config import config_from_public
from piip_core.checkpoints.released import keep_converted
from piip_core.checkpoints.rules import Rule, RuleTable, rename_parts
from piip_core.errors import CheckpointError, NotSupportedYet
from piip_core.files import publish_folder, read_json, write_atomically
from piip_core.meta import on_meta

from .assembly import add_image_token, assemble_processor, load_part
from .configuration import PIIPLlavaConfig, PIIPVisionConfig
from .modeling import PIIPLlavaForConditionalGeneration

PUBLISHED_TOWER, PUBLISHED_PROJECTOR = "model.vision_tower.vision_tower.", "model.mm_projector."
OUR_TOWER, OUR_PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
# In a Llama of transformers, and where ours has it
_DECODER = rename_parts(
    *((f"model.language_model.{name}", f"model.{name}") for name in ("*.weight", "layers.*.*.*", "layers.*.*.*.*")),
    "lm_head.*",
)
# Fields of a published config.json that belong to LLaVA, not to the language model
_LLAVA_FIELDS = ("mm_", "image_", "vision_tower_", "tokenizer_", "tune_", "freeze_", "use_mm_", "output_dir")
_NORMS = {"gn": "group", "ln": "layer"}
_EMBEDDINGS = "model.embed_tokens.weight"


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
    vision, origin = find_vision(file.state.shapes(), row, vision_config, clip_configs or {})
    tokenizer = add_image_token(_tokenizer(source))
    config = PIIPLlavaConfig(
        **vision,
        text_config=_text_config(fields),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
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
    return Conversion(report, origin, target)


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
    classes = (file.description or {}).get("branch_classes") or [
        "convnext_timm" if isinstance(branch.network, ConvNeXtConfig) else default_branch_class(branch)
        for branch in vision.branches
    ]
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
    names = ProjectorNames(projector_rules(num_branches, projector_norm))
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


# ---- Names of weights ----


@dataclass(frozen=True)
class LlavaNames(PublishedNames):
    """The complete name map of one model: that of its vision tower, with projectors and language model.

    Args:
        model: Configuration of our model.
    """

    model: PIIPLlavaConfig | None = None

    @classmethod
    def of(cls, model: PIIPLlavaConfig, branch_classes: Sequence[str]) -> LlavaNames:
        """The map for a model, with the published class of each branch; see `piip_core.checkpoints`."""
        return cls(
            model.vision_config.piip,
            tuple(branch_classes),
            ours_prefix=OUR_TOWER,
            published_prefix=PUBLISHED_TOWER,
            scale="weight",
            model=model,
        )

    @classmethod
    def of_published(cls, keys: Iterable[str], model: PIIPLlavaConfig) -> LlavaNames:
        """The map for a published file, whose keys tell the classes of the branches."""
        tower = [key.removeprefix(PUBLISHED_TOWER) for key in keys if key.startswith(PUBLISHED_TOWER)]
        return cls.of(model, branch_classes_of(tower, len(model.vision_config.piip.branches)))

    def table(self) -> RuleTable:
        """All rules."""
        projector = projector_rules(len(self.branch_classes), self.model.projector_norm)
        projector = (rule.prefixed(OUR_PROJECTOR, PUBLISHED_PROJECTOR) for rule in projector)
        return RuleTable([*super().table().rules, *projector, *_DECODER])

    def shapes(self) -> Mapping[str, torch.Size]:
        """Name and shape of every tensor of our model, without allocating it."""
        with on_meta():
            model = PIIPLlavaForConditionalGeneration(self.model)
        tied = set(model.all_tied_weights_keys)
        return {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}


@dataclass(frozen=True)
class ProjectorNames(NameMap):
    """The name map of projectors alone, to those of `TokenMerging`."""

    rules: tuple[Rule, ...]

    def table(self) -> RuleTable:
        """All rules."""
        return RuleTable(rule.prefixed("", PUBLISHED_PROJECTOR) for rule in self.rules)

    def shapes(self) -> Mapping[str, torch.Size | None]:
        """Names of all tensors, of any shape."""
        return {rule.ours.replace("*", part): None for rule in self.rules for part in ("weight", "bias")}


# ---- What a published folder says of its vision tower: a named row, a Python file, or its shapes ----


def find_vision(
    shapes: Mapping[str, Sequence[int]],
    row: str | None,
    vision_config: str | os.PathLike[str] | None,
    clip_configs: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], str]:
    """Vision tower and projector of a published folder, for `PIIPLlavaConfig`, and what tells them, in words."""
    if row is not None or vision_config is None:
        entry = zoo.multimodal(row) if row is not None else recognise_row(shapes)
        origin = "the row that was named" if row is not None else f"recognised as {entry.name}"
        tower = PIIPVisionConfig(pyramid=entry.vision.to_dict())
        return {"vision_config": tower, "projector_norm": entry.projector_norm}, origin
    public = published_vision_config(Path(vision_config))
    backbone = {
        key: value | {"clip_config": clip_configs[value["pretrained"]]}
        if isinstance(value, Mapping) and value.get("pretrained") in clip_configs
        else value
        for key, value in public["backbone"].items()
    }
    norm = public["projector"].get("norm", "gn")
    if norm not in _NORMS:
        raise CheckpointError(f"{vision_config}: projector norm {norm!r}, expected one of {', '.join(_NORMS)}")
    tower = PIIPVisionConfig(pyramid=config_from_public(backbone, _tower(shapes)).to_dict())
    grid = public["projector"].get("out_shape")
    vision = {"vision_config": tower, "projector_norm": _NORMS[norm], "projector_grid": grid}
    return vision, f"the vision configuration {vision_config}"


def recognise_row(shapes: Mapping[str, Sequence[int]]) -> zoo.MultimodalEntry:
    """Finds the published row that a state dict belongs to; of rows that differ in their training alone the first.

    Args:
        shapes: Published name -> shape.

    Raises:
        CheckpointError: If no row fits.
    """
    width, tower = tuple(shapes.get(_EMBEDDINGS, ()))[-1:], _tower(shapes)
    for entry in zoo.multimodal_entries():
        if width == (entry.embed_dim,) and len(entry.vision.branches) > 1 and _fits(tower, entry.vision):
            return entry
    raise CheckpointError(
        "the tensors fit no published row; name it (--row), or give the vision configuration (--vision-config). Rows "
        "are " + ", ".join(entry.name for entry in zoo.multimodal_entries())
    )


def _tower(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Shapes below the vision tower."""
    inside = {key: tuple(shape) for key, shape in shapes.items() if key.startswith(PUBLISHED_TOWER)}
    return {key.removeprefix(PUBLISHED_TOWER): shape for key, shape in inside.items()}


def _fits(tower: Mapping[str, tuple[int, ...]], config: PIIPConfig) -> bool:
    try:
        names = PublishedNames(config, branch_classes_of(tower, len(config.branches)), scale="weight")
    except (CheckpointError, NotSupportedYet):
        return False
    return to_ours({key: torch.empty(shape, device="meta") for key, shape in tower.items()}, names)[1].complete


def published_vision_config(path: Path) -> dict[str, Any]:
    """Reads `model = dict(backbone=..., projector=...)` from a Python file that has nothing but such assignments.

    Returns:
        The fields of `model`.

    Raises:
        CheckpointError: If the file has anything else than literals and calls of `dict`.
    """
    try:
        tree = ast.parse(path.read_text())
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable Python file ({error})") from None
    names: dict[str, Any] = {}
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                names[name] = _value(value, names, path)
            case ast.Expr(value=ast.Constant()):  # a docstring
                pass
            case _:
                raise _unexpected(path, node)
    model = names.get("model")
    if not isinstance(model, Mapping) or not {"backbone", "projector"} <= set(model):
        raise CheckpointError(f"{path}: expected model = dict(backbone=..., projector=...)")
    return dict(model)


def _value(node: ast.expr, names: Mapping[str, Any], path: Path) -> Any:
    """A literal, a call of `dict`, or a name that was assigned before; nothing is executed."""
    match node:
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords) if all(k.arg for k in keywords):
            return {keyword.arg: _value(keyword.value, names, path) for keyword in keywords}
        case ast.Dict(keys=keys, values=values) if all(key is not None for key in keys):
            return {_value(k, names, path): _value(v, names, path) for k, v in zip(keys, values, strict=True)}
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, names, path) for item in items]
        case ast.Name(id=name) if name in names:
            return names[name]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise _unexpected(path, node) from None


def _unexpected(path: Path, node: ast.AST) -> CheckpointError:
    return CheckpointError(
        f"{path}, line {getattr(node, 'lineno', '?')}: only assignments of literals and dict(...) are read, and "
        "nothing is executed; name the row instead (--row)"
    )
