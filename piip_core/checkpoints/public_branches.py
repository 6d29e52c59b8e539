"""Settings of one branch in the public field names, and the shapes of its parameters, to our `BranchConfig`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ..branches import BEiTConfig, ConvNeXtConfig, NetworkConfig, UniPerceiverConfig, ViTConfig
from ..config import BranchConfig
from ..errors import NotSupportedYet

__all__ = ["Shapes", "branch_from_public", "check_fields", "num_blocks"]

Shapes = Mapping[str, Sequence[int]]
Settings = Mapping[str, Any]

# Fields without influence on what the network computes in evaluation, or on its parameters
_RUNTIME_FIELDS = {"type", "pretrained", "with_cp", "cal_flops", "output_dtype", "layerscale_force_fp32"}
_RUNTIME_FIELDS |= {"with_fpn", "pretrain_patch_size", "img_size", "use_simple_fpn", "out_indices"}
_COMMON_FIELDS = {"real_size", "interaction_indexes", "drop_path_rate"}
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


def branch_from_public(
    settings: Settings, branch_class: str, shapes: Shapes, *, multi: bool, classifies: bool = False
) -> BranchConfig:
    """Reads the settings of one branch.

    Args:
        settings: Fields of the public branch class; `clip_config` may hold what transformers' configuration of a CLIP
            branch says, of which public settings only give the name.
        branch_class: Published class of the branch.
        shapes: Shapes of the published parameters below the branch.
        multi: Whether the branch is one of several, with segments.
        classifies: Whether it belongs to a classifier, which may keep its class token.

    Raises:
        NotSupportedYet: For fields or values that our configuration cannot express.
    """
    keeps_token = branch_class == "clip" or (classifies and branch_class in _TOKEN_CLASSES)
    fixed = _FIXED_FIELDS if keeps_token else _FIXED_FIELDS | _DENSE_FIELDS
    for field, (supported, feature) in fixed.items():
        if settings.get(field, supported) != supported:
            raise NotSupportedYet(feature)
    settings = {key: value for key, value in settings.items() if key not in fixed}
    network, options = _READERS[branch_class](settings, shapes)
    return BranchConfig(
        network=network,
        image_size=settings["real_size" if "real_size" in settings else "img_size"],
        segments=tuple(map(tuple, settings["interaction_indexes"])) if multi else None,
        drop_path_rate=settings.get("drop_path_rate", 0.0),
        **options,
    )


def check_fields(fields: Collection[str], known: Collection[str]) -> None:
    """Raises NotSupportedYet for fields that are not known."""
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise NotSupportedYet(f"public configuration field {', '.join(unknown)}")


def num_blocks(shapes: Collection[str], list_name: str = "blocks") -> int:
    """Number of blocks among parameter names such as `blocks.0.norm1.weight`."""
    return len({key.split(".")[1] for key in shapes if key.startswith(f"{list_name}.")})


def _deit(settings: Settings, shapes: Shapes) -> tuple[ViTConfig, dict[str, Any]]:
    check_fields(settings, _RUNTIME_FIELDS | _COMMON_FIELDS | _TRANSFORMER_FIELDS | {"Mlp_block", "use_cls_token"})
    values = {**_TRANSFORMER_DEFAULTS, **_DEIT_DEFAULTS, **settings}
    network = _vit(values, shapes, layer_scale=values["init_scale"], activation=values.get("Mlp_block", "regular"))
    # The flash-attention path pads before the projection, the other one behind it
    padding = "before_qkv" if values["use_flash_attn"] else "after_qkv"
    return network, {"window_size": _windows(values), "window_padding": padding}


def _internvit(settings: Settings, shapes: Shapes) -> tuple[ViTConfig, dict[str, Any]]:
    if settings.get("model_type") == "augreg":
        return _augreg(settings, shapes)
    own = {"norm_layer_type", "qk_normalization", "mlp_type"}
    check_fields(settings, _RUNTIME_FIELDS | _COMMON_FIELDS | _TRANSFORMER_FIELDS | own)
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
    check_fields(settings, _RUNTIME_FIELDS | _COMMON_FIELDS | _TRANSFORMER_FIELDS | {"model_type", "use_cls_token"})
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
    check_fields(settings, _RUNTIME_FIELDS | _COMMON_FIELDS | _TRANSFORMER_FIELDS | {"use_rel_pos_bias"})
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
    check_fields(settings, _RUNTIME_FIELDS | _COMMON_FIELDS | _TRANSFORMER_FIELDS)
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
    check_fields(settings, _RUNTIME_FIELDS | _COMMON_FIELDS | {"downsample_ratios"})
    scales: dict[int, list[int]] = {}
    for key, shape in shapes.items():
        parts = key.split(".")
        if parts[-1] == "layer_scale_parameter":
            scales.setdefault(int(parts[parts.index("stages") + 1]), []).append(shape[0])
    return _convnext_of_stages(settings, scales), {"drop_path_schedule": "linear"}


def _convnext_timm(settings: Settings, shapes: Shapes) -> tuple[ConvNeXtConfig, dict[str, Any]]:
    check_fields(settings, _RUNTIME_FIELDS | _COMMON_FIELDS | {"downsample_ratios", "model_type"})
    scales: dict[int, list[int]] = {}
    for key, shape in shapes.items():
        match key.split("."):
            case ["convnext_model", "stages", stage, "blocks", _, "weight"]:
                scales.setdefault(int(stage), []).append(shape[0])
    return _convnext_of_stages(settings, scales), {"drop_path_schedule": "linear"}


def _convnext_of_stages(settings: Settings, scales: Mapping[int, Sequence[int]]) -> ConvNeXtConfig:
    """From the widths of the layer scales in each stage."""
    stages = [scales[stage] for stage in sorted(scales)]
    network = ConvNeXtConfig(depths=tuple(map(len, stages)), stage_dims=tuple(dims[0] for dims in stages))
    ratios = settings.get("downsample_ratios")
    if ratios is not None and tuple(ratios) != network.strides:
        raise NotSupportedYet(f"downsample_ratios={list(ratios)}")
    return network


def _clip(settings: Settings, shapes: Shapes) -> tuple[ViTConfig, dict[str, Any]]:
    """Sizes that shapes do not tell are those of every released CLIP, unless `clip_config` has others."""
    own = {"model_type", "clip_config", "use_cls_token", "pretrain_patch_size", "patch_size"}
    check_fields(settings, _RUNTIME_FIELDS | _COMMON_FIELDS | own)
    details = settings.get("clip_config", {})
    width, _, _, patch_size = shapes["clip_model.embeddings.patch_embedding.weight"]
    hidden = shapes["clip_model.encoder.layers.0.mlp.fc1.weight"][0]
    class_token = settings.get("use_cls_token", False)
    network = ViTConfig(
        embed_dim=width,
        depth=len({key.split(".")[3] for key in shapes if key.startswith("clip_model.encoder.layers.")}),
        num_heads=details.get("num_attention_heads", width // 64),
        mlp_ratio=hidden / width,
        patch_size=patch_size,
        pos_grid=round((shapes["clip_model.embeddings.position_embedding.weight"][0] - 1) ** 0.5),
        layer_scale=None,
        norm_eps=details.get("layer_norm_eps", 1e-5),
        activation=details.get("hidden_act", "quick_gelu"),
        pre_norm=True,
        class_token=class_token,
        class_position=class_token,
    )
    return network, {}


_READERS: Mapping[str, Callable[[Settings, Shapes], tuple[NetworkConfig, dict[str, Any]]]] = {
    "deit": _deit,
    "internvit": _internvit,
    "beit": _beit,
    "uniperceiver": _uniperceiver,
    "convnext": _convnext,
    "convnext_timm": _convnext_timm,
    "convnext_timm_mlp": _convnext_timm,
    "clip": _clip,
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
