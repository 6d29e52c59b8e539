"""Names of the parameters of single branches: ours, which are timm's, against those of the published classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from timm.layers import gen_relative_position_index
from torch import Tensor

from ..branches import BEiTConfig, ConvNeXtConfig, NetworkConfig, UniPerceiverConfig, ViTConfig
from ..config import BranchConfig
from ..errors import CheckpointError, NotSupportedYet
from .rules import CLASS_TOKEN, POSITION_SLOT, POSITION_TABLE, POSITION_TABLE_SLOT, Rule, rename_parts

# What a block has under one name on both sides: scales, norms, attention, perceptron
_BLOCK = ("blocks.*.*", "blocks.*.*.*", "blocks.*.*.*.*")

_CONVNEXT_TIMM = rename_parts(
    ("stem.*.*", "convnext_model.stem.*.*"),
    ("stages.*.downsample.*.*", "convnext_model.stages.*.downsample.*.*"),
    ("stages.*.blocks.*.conv_dw.*", "convnext_model.stages.*.blocks.*.conv_dw.*"),
    ("stages.*.blocks.*.norm.*", "convnext_model.stages.*.blocks.*.norm.*"),
    ("stages.*.blocks.*.mlp.*.*", "convnext_model.stages.*.blocks.*.mlp.*.*"),
    ("stages.*.blocks.*.gamma", "convnext_model.stages.*.blocks.*.weight"),
)
_CLIP_LAYER = "clip_model.encoder.layers.*"

BRANCH_CLASSES: Mapping[str, tuple[Rule, ...]] = {
    # DeiT and DeiT III
    "deit": rename_parts(
        ("blocks.*.ls*.gamma", "blocks.*.gamma_*"),
        "pos_embed",
        "patch_embed.proj.*",
        *_BLOCK,
    ),
    # InternViT-6B, and by the same class AugReg, MAE, DINOv2
    "internvit": (
        Rule("pos_embed", "pos_embed", POSITION_SLOT),
        *rename_parts("patch_embed.proj.*", *_BLOCK),
    ),
    "beit": rename_parts("patch_embed.proj.*", *_BLOCK),
    "uniperceiver": (
        Rule("pos_embed", "visual_embed.patch_embed.spatial_pos_embed.weight", POSITION_TABLE),
        *rename_parts(
            ("frame_embed", "visual_embed.patch_embed.temporal_pos_embed.weight"),
            ("patch_embed.proj.*", "visual_embed.patch_embed.proj.*"),
            ("norm_pre.*", "visual_embed.embeddings_norm.*"),
            ("blocks.*.norm*.*", "layers.*.norm*.*"),
            ("blocks.*.attn.qkv.*", "layers.*.self_attn.in_proj.*"),
            ("blocks.*.attn.proj.*", "layers.*.self_attn.out_proj.*"),
            ("blocks.*.mlp.fc*.*", "layers.*.linear*.*"),
            ("blocks.*.ls*.gamma", "layers.*.gamma_*"),
        ),
    ),
    # transformers' ConvNeXt
    "convnext": rename_parts(
        ("stem.0.*", "convnext_model.embeddings.patch_embeddings.*"),
        ("stem.1.*", "convnext_model.embeddings.layernorm.*"),
        ("stages.*.downsample.*.*", "convnext_model.encoder.stages.*.downsampling_layer.*.*"),
        ("stages.*.blocks.*.conv_dw.*", "convnext_model.encoder.stages.*.layers.*.dwconv.*"),
        ("stages.*.blocks.*.norm.*", "convnext_model.encoder.stages.*.layers.*.layernorm.*"),
        ("stages.*.blocks.*.mlp.fc*.*", "convnext_model.encoder.stages.*.layers.*.pwconv*.*"),
        ("stages.*.blocks.*.gamma", "convnext_model.encoder.stages.*.layers.*.layer_scale_parameter"),
    ),
    # timm's ConvNeXt; transformers before 4.49 renamed every "gamma" to "weight" when it loaded a model
    "convnext_timm": _CONVNEXT_TIMM,
    # the same with a hidden layer in its head
    "convnext_timm_mlp": _CONVNEXT_TIMM,
    # transformers' CLIP
    "clip": (
        Rule("pos_embed", "clip_model.embeddings.position_embedding.weight", POSITION_TABLE),
        Rule("cls_token", "clip_model.embeddings.class_embedding", CLASS_TOKEN),
        *(Rule("blocks.*.attn.qkv.*", f"{_CLIP_LAYER}.self_attn.{x}_proj.*", part=i) for i, x in enumerate("qkv")),
        *rename_parts(
            ("patch_embed.proj.*", "clip_model.embeddings.patch_embedding.*"),
            ("norm_pre.*", "clip_model.pre_layrnorm.*"),
            ("blocks.*.norm*.*", f"{_CLIP_LAYER}.layer_norm*.*"),
            ("blocks.*.attn.proj.*", f"{_CLIP_LAYER}.self_attn.out_proj.*"),
            ("blocks.*.mlp.fc*.*", f"{_CLIP_LAYER}.mlp.fc*.*"),
        ),
    ),
}

# A component of names that only one published class has; the first one found decides
_MARKERS = {
    "clip_model": "clip",
    "pre_logits": "convnext_timm_mlp",
    "conv_dw": "convnext_timm",
    "convnext_model": "convnext",
    "relative_position_bias_table": "beit",
    "visual_embed": "uniperceiver",
    "gamma_1": "deit",
    "blocks": "internvit",
}

UNUSED = "the network never uses it, or it is computed here"


def branch_rules(branch_class: str, network: NetworkConfig) -> tuple[Rule, ...]:
    """Rules for a branch of a published class, with a certain network."""
    rules = BRANCH_CLASSES[branch_class]
    class_token = getattr(network, "class_token", False)
    if branch_class == "clip" and not class_token:
        (position,) = (rule for rule in rules if rule.ours == "pos_embed")
        return (replace(position, change=POSITION_TABLE_SLOT), *rules)
    if branch_class in ("deit", "internvit") and class_token:  # in classifiers
        return (*rules, *rename_parts("cls_token"))
    return rules


def branch_class_of(keys: Iterable[str]) -> str:
    """Published class of a branch, from the keys below it.

    Raises:
        NotSupportedYet: For families that have no table here.
    """
    keys = list(keys)
    components = {part for key in keys for part in key.split(".")}
    name = next((value for marker, value in _MARKERS.items() if marker in components), None)
    if name is None:
        raise NotSupportedYet(f"branches with keys such as {', '.join(keys[:3])}")
    return name


def branch_classes_of(keys: Iterable[str], count: int) -> tuple[str, ...]:
    """Published classes of all branches, from the keys of a backbone.

    Raises:
        CheckpointError: If the file has fewer branches.
        NotSupportedYet: For families that have no table here.
    """
    keys, classes = list(keys), []
    for number in range(1, count + 1):
        prefix = branch_prefix(number, count)
        inside = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
        if not inside:
            raise CheckpointError(
                f"no parameter starts with {prefix!r}: the file has fewer branches than the configuration"
            )
        classes.append(branch_class_of(inside))
    return tuple(classes)


def branch_prefix(number: int, count: int) -> str:
    """Where a published backbone with so many branches has one of them, counted from 1."""
    return "" if count == 1 else f"branch{number}."


def default_branch_class(branch: BranchConfig) -> str:
    """Published class for a branch of ours.

    Two classes hold plain vision transformers: one has layer scales and the same stochastic depth in all blocks (DeiT),
    the other lets it grow, or has no layer scales (InternViT, AugReg, MAE, DINOv2).

    Raises:
        NotSupportedYet: For networks that no published class holds.
    """
    match branch.network:
        case BEiTConfig():
            return "beit"
        case UniPerceiverConfig():
            return "uniperceiver"
        case ConvNeXtConfig():
            return "convnext"
        case ViTConfig(pre_norm=True):
            return "clip"
        case ViTConfig() as network:
            grows = branch.drop_path_schedule == "linear"
            return "internvit" if network.qk_norm or grows or network.layer_scale is None else "deit"
    raise NotSupportedYet(f"published names of {type(branch.network).__name__}")


def unused_branch_tensors(branch_class: str, network: NetworkConfig) -> dict[str, Tensor]:
    """Tensors of a published branch that ours does not have, by published name."""
    dim = network.dims[-1]
    match branch_class:
        case "convnext":
            return _unused_norm("convnext_model.layernorm", dim)
        case "convnext_timm":
            return _unused_norm("convnext_model.head.norm", dim)
        case "convnext_timm_mlp":
            layer = "convnext_model.head.pre_logits.fc"
            hidden = {f"{layer}.weight": torch.zeros(dim, dim), f"{layer}.bias": torch.zeros(dim)}
            return _unused_norm("convnext_model.head.norm", dim) | hidden
        case "clip":
            norm = _unused_norm("clip_model.post_layernorm", dim)
            if getattr(network, "class_token", True):
                return norm
            return norm | {"clip_model.embeddings.class_embedding": torch.zeros(dim)}
        case "beit":
            assert isinstance(network, BEiTConfig)
            index = gen_relative_position_index((network.bias_window, network.bias_window))
            return {f"blocks.{i}.attn.relative_position_index": index for i in range(network.depth)}
    return {}


def _unused_norm(name: str, dim: int) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.ones(dim), f"{name}.bias": torch.zeros(dim)}
