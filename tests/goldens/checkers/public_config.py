"""Public configurations of detectors, segmentors and classifiers to ours: what the golden cases are built from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from piip_core.branches import BEiTConfig, ConvNeXtConfig, UniPerceiverConfig, ViTConfig
from piip_core.checkpoints.branch_names import branch_class_of
from piip_core.checkpoints.public_config import (
    BRANCH_FIELDS,
    READERS,
    Reader,
    Settings,
    Shapes,
    branch_of,
    check_fields,
    config_from_public,
    convnext_of_stages,
)
from piip_core.config import ClassifierConfig, InteractionConfig, MergingConfig, PIIPConfig
from piip_core.errors import CheckpointError, NotSupportedYet

_TRANSFORMER_FIELDS = {"depth", "embed_dim", "num_heads", "mlp_ratio", "patch_size", "qkv_bias", "pretrain_img_size"}
_TRANSFORMER_FIELDS |= {"window_attn", "window_size", "use_flash_attn", "init_scale", "init_values"}
# Fields that only have one supported value, and what another value would need
_FIXED_FIELDS = {
    "with_final_norm": (False, "a final norm in a branch"),
    "drop_rate": (0.0, "dropout in a branch"),
    "attn_drop_rate": (0.0, "attention dropout in a branch"),
    "in_chans": (3, "images with other than 3 channels"),
    "qk_scale": (None, "a fixed attention scale"),
    "use_abs_pos_emb": (False, "absolute position embeddings in BEiT"),
    "use_shared_rel_pos_bias": (False, "a relative position bias shared by the blocks of BEiT"),
}
_DENSE_FIELDS = {"use_cls_token": (False, "class tokens in dense models")}
# Classes of branches that keep a class token in classifiers
_TOKEN_CLASSES = ("clip", "deit", "internvit")
_NORMS = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}
# The fused MLP approximates GELU
_ACTIVATIONS = {"regular": "gelu", "fused_mlp": "gelu_tanh"}

# Defaults of the public classes, where a config may leave the field out
_TRANSFORMER_DEFAULTS = {"mlp_ratio": 4.0, "qkv_bias": False, "pretrain_img_size": 224, "patch_size": 16}
_DEIT_DEFAULTS = {"depth": 12, "embed_dim": 768, "num_heads": 12, "init_scale": 1e-4, "use_flash_attn": False}
_INTERNVIT_DEFAULTS = {
    "depth": 48,
    "embed_dim": 3200,
    "num_heads": 25,
    "patch_size": 14,
    "init_values": 0.1,
    "window_size": 14,
    "qk_normalization": True,
    "norm_layer_type": "RMSNorm",
}


def backbone_from_public(
    public: Mapping[str, Any], state_shapes: Shapes, *, branch4_built_from: str | None = None
) -> PIIPConfig:
    """Reads the configuration of a detector's or segmentor's backbone, or of a single-branch baseline.

    Args:
        public: Fields of the public backbone class, or of the branch itself.
        state_shapes: Shapes of the published state dict below the backbone.
        branch4_built_from: "branch3 config" if Branch 4 takes all but `real_size` and `interaction_indexes` from
            Branch 3 (what the public class does), "branch4 config" if not. None decides by the shapes.

    Raises:
        NotSupportedYet: For families, fields or values that our configuration cannot express.
        CheckpointError: If the parameters do not belong to such a configuration.
    """
    if "branch1" not in public:
        return _single_branch(public, state_shapes)
    public = dict(public)
    if "branch4" in public:
        shapes = {key.removeprefix("branch4."): shape for key, shape in state_shapes.items() if "branch4." in key}
        third, fourth = (dict(public[name]) for name in ("branch3", "branch4"))
        public["branch4"] = _fourth_branch(third, fourth, shapes, branch4_built_from)
    config = config_from_public(public, state_shapes, _readers(classifies=False))
    return dataclasses.replace(config, merging=_merging(public))


def classifier_from_public(public: Mapping[str, Any], state_shapes: Shapes) -> ClassifierConfig:
    """Reads the configuration of a published classifier, whose branches may keep their class tokens."""
    fields = dict(public)
    separate = fields.pop("separate_head", False)
    backbone = config_from_public(fields, state_shapes, _readers(classifies=True))
    classifier = state_shapes["branch1.head.bias" if separate else "cls_head.bias"]
    return ClassifierConfig(
        pyramid=backbone,
        num_classes=classifier[0],
        head="separate" if separate else "merged",
        pooling="first_patch" if separate else "average",
    )


def _readers(*, classifies: bool) -> dict[str, Reader]:
    """Readers of all published classes, which refuse what our branches cannot express."""

    def checked(branch_class: str, read: Reader) -> Reader:
        keeps_token = branch_class == "clip" or (classifies and branch_class in _TOKEN_CLASSES)
        fixed = _FIXED_FIELDS if keeps_token else _FIXED_FIELDS | _DENSE_FIELDS

        def call(settings: Settings, shapes: Shapes) -> Any:
            for field, (supported, feature) in fixed.items():
                if settings.get(field, supported) != supported:
                    raise NotSupportedYet(feature)
            return read({key: value for key, value in settings.items() if key not in fixed}, shapes)

        return call

    return {name: checked(name, read) for name, read in (_READERS | READERS).items()}


def _single_branch(public: Mapping[str, Any], shapes: Shapes) -> PIIPConfig:
    branch_class = branch_class_of(shapes)
    settings = {"real_size": public.get("img_size", public.get("pretrain_img_size", 224)), **public}
    network, options = _readers(classifies=False)[branch_class](settings, shapes)
    branch = branch_of(network, settings, segments=None, **options)
    last = branch.network.depth - 1
    if branch_class == "convnext":
        merging = MergingConfig(kind="single", out_blocks=branch.network.last_blocks())
    elif public.get("use_simple_fpn", True) and public.get("with_fpn", True):
        if public.get("out_indices", [last])[-1] != last:
            raise NotSupportedYet("a single-branch feature pyramid not made from the last block")
        merging = MergingConfig(kind="single", pyramid_norm="layer")
    else:
        raise NotSupportedYet("a single-branch feature pyramid not made from the last block")
    return PIIPConfig(branches=(branch,), interaction=InteractionConfig(num_interactions=0), merging=merging)


def _fourth_branch(
    third: dict[str, Any], fourth: dict[str, Any], shapes: Shapes, built_from: str | None
) -> dict[str, Any]:
    as_released = {**third, **{key: fourth[key] for key in ("real_size", "interaction_indexes")}}
    candidates = {"branch4 config": fourth, "branch3 config": as_released}
    if built_from is not None:
        if built_from not in candidates:
            raise NotSupportedYet(f"branch4_built_from={built_from!r}")
        return candidates[built_from]
    fitting = [settings for settings in candidates.values() if _fits(settings, shapes)]
    if not fitting:
        raise CheckpointError("the shapes of branch4 fit neither its own settings nor those of branch3")
    return fitting[0]


def _fits(settings: Mapping[str, Any], shapes: Shapes) -> bool:
    width = shapes["patch_embed.proj.weight"][0]
    return (width, num_blocks(shapes)) == (settings["embed_dim"], settings["depth"])


def _merging(public: Mapping[str, Any]) -> MergingConfig:
    is_dino = public.get("is_dino", False)
    strides = (8, 16, 32) if is_dino else (4, 8, 16, 32)
    if public.get("with_simple_fpn", True):
        return MergingConfig(out_strides=strides)
    if is_dino:
        raise NotSupportedYet("is_dino together with with_simple_fpn=False")
    return MergingConfig(kind="regular", intermediate_after=tuple(public.get("out_interaction_indexes", ())))


def num_blocks(shapes: Collection[str], list_name: str = "blocks") -> int:
    """Number of blocks among parameter names such as `blocks.0.norm1.weight`."""
    return len({key.split(".")[1] for key in shapes if key.startswith(f"{list_name}.")})


def _deit(settings: Settings, shapes: Shapes) -> tuple[ViTConfig, dict[str, Any]]:
    check_fields(settings, BRANCH_FIELDS | _TRANSFORMER_FIELDS | {"Mlp_block", "use_cls_token"})
    values = {**_TRANSFORMER_DEFAULTS, **_DEIT_DEFAULTS, **settings}
    network = _vit(values, shapes, layer_scale=values["init_scale"], activation=values.get("Mlp_block", "regular"))
    # The flash-attention path pads before the projection, the other one behind it
    padding = "before_qkv" if values["use_flash_attn"] else "after_qkv"
    return network, {"window_size": _windows(values), "window_padding": padding}


def _internvit(settings: Settings, shapes: Shapes) -> tuple[ViTConfig, dict[str, Any]]:
    if settings.get("model_type") == "augreg":
        return _augreg(settings, shapes)
    own = {"norm_layer_type", "qk_normalization", "mlp_type"}
    check_fields(settings, BRANCH_FIELDS | _TRANSFORMER_FIELDS | own)
    values = {**_TRANSFORMER_DEFAULTS, **_INTERNVIT_DEFAULTS, **settings}
    network = _vit(
        values,
        shapes,
        layer_scale=values["init_values"],
        activation=values.get("mlp_type", "regular"),
        norm=_choose(_NORMS, values["norm_layer_type"], "norm_layer_type"),
        qk_norm=values["qk_normalization"],
    )
    return network, {"window_size": _windows(values), "drop_path_schedule": "linear"}


def _augreg(settings: Settings, shapes: Shapes) -> tuple[ViTConfig, dict[str, Any]]:
    """Of classifiers; dense models hold AugReg in the class of InternViT."""
    check_fields(settings, BRANCH_FIELDS | _TRANSFORMER_FIELDS | {"model_type", "use_cls_token"})
    values = {**_TRANSFORMER_DEFAULTS, **settings}
    return _vit(values, shapes, layer_scale=None, activation="regular"), {"window_size": _windows(values)}


def _vit(values: Settings, shapes: Shapes, *, layer_scale: float | None, activation: str, **options: Any) -> ViTConfig:
    return ViTConfig(
        embed_dim=values["embed_dim"],
        depth=values["depth"],
        num_heads=values["num_heads"],
        mlp_ratio=float(values["mlp_ratio"]),
        patch_size=values["patch_size"],
        qkv_bias=values["qkv_bias"],
        # Not from the settings: segmentation files have the grid of the crop, others that of pretraining, and some one
        # more entry for a class token
        pos_grid=math.isqrt(shapes["pos_embed"][1]),
        layer_scale=layer_scale,
        activation=_choose(_ACTIVATIONS, activation, "MLP"),
        class_token=values.get("use_cls_token", False),
        **options,
    )


def _beit(settings: Settings, shapes: Shapes) -> tuple[BEiTConfig, dict[str, Any]]:
    # The tables are there and added even with use_rel_pos_bias=False
    check_fields(settings, BRANCH_FIELDS | _TRANSFORMER_FIELDS | {"use_rel_pos_bias"})
    values = {**_TRANSFORMER_DEFAULTS, **settings}
    entries = shapes["blocks.0.attn.relative_position_bias_table"][0]
    network = BEiTConfig(
        embed_dim=values["embed_dim"],
        depth=values["depth"],
        num_heads=values["num_heads"],
        mlp_ratio=float(values["mlp_ratio"]),
        patch_size=values["patch_size"],
        qkv_bias=values["qkv_bias"],
        layer_scale=values.get("init_values"),
        bias_window=(round(entries**0.5) + 1) // 2,
    )
    return network, {"window_size": _windows(values), "drop_path_schedule": "linear"}


def _uniperceiver(settings: Settings, shapes: Shapes) -> tuple[UniPerceiverConfig, dict[str, Any]]:
    check_fields(settings, BRANCH_FIELDS | _TRANSFORMER_FIELDS)
    values = {**_TRANSFORMER_DEFAULTS, **settings}
    network = UniPerceiverConfig(
        embed_dim=values["embed_dim"],
        depth=values["depth"],
        num_heads=values["num_heads"],
        mlp_ratio=float(values["mlp_ratio"]),
        patch_size=values["patch_size"],
        pos_grid=round(shapes["visual_embed.patch_embed.spatial_pos_embed.weight"][0] ** 0.5),
        num_frames=shapes["visual_embed.patch_embed.temporal_pos_embed.weight"][0],
    )
    return network, {"window_size": _windows(values), "drop_path_schedule": "linear"}


def _convnext(settings: Settings, shapes: Shapes) -> tuple[ConvNeXtConfig, dict[str, Any]]:
    """Public settings say nothing about the sizes, which hide in the name of a downloaded model."""
    check_fields(settings, BRANCH_FIELDS | {"downsample_ratios"})
    scales: dict[int, list[int]] = {}
    for key, shape in shapes.items():
        parts = key.split(".")
        if parts[-1] == "layer_scale_parameter":
            scales.setdefault(int(parts[parts.index("stages") + 1]), []).append(shape[0])
    return convnext_of_stages(settings, scales), {"drop_path_schedule": "linear"}


_READERS: Mapping[str, Reader] = {
    "deit": _deit,
    "internvit": _internvit,
    "beit": _beit,
    "uniperceiver": _uniperceiver,
    "convnext": _convnext,
}


def _choose(choices: Mapping[str, str], value: str, field: str) -> str:
    if value not in choices:
        raise NotSupportedYet(f"{field}={value!r}")
    return choices[value]


def _windows(values: Settings) -> tuple[int | None, ...]:
    def per_block(field: str, default: Any) -> list[Any]:
        value = values.get(field)
        value = default if value is None else value
        return list(value) if isinstance(value, (list, tuple)) else [value] * values["depth"]

    flags, sizes = per_block("window_attn", False), per_block("window_size", -1)
    return tuple(size if flag and size > 0 else None for flag, size in zip(flags, sizes, strict=True))
