"""Configurations in the public field names (the `backbone=dict(...)` of published configs) to our `PIIPConfig`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import BranchConfig, InteractionConfig, MergingConfig, PIIPConfig, ViTConfig
from ..errors import CheckpointError, NotSupportedYet
from .names import branch_class_of

__all__ = ["PublishedModel", "branch_keys", "config_from_public"]

Shapes = Mapping[str, Sequence[int]]

# Fields without influence on what the network computes in evaluation, or on its parameters
_RUNTIME_FIELDS = {"type", "pretrained", "with_cp", "cal_flops", "output_dtype", "layerscale_force_fp32"}
_RUNTIME_FIELDS |= {"with_fpn", "pretrain_patch_size", "img_size", "use_simple_fpn"}
# Fields that only have one supported value, and what another value would need
_FIXED_FIELDS = {
    "norm_layer_type": ("LayerNorm", "RMSNorm"),
    "qk_normalization": (False, "qk-norm"),
    "mlp_type": ("regular", "the fused MLP (GELU as tanh approximation)"),
    "with_final_norm": (False, "a final norm in a branch"),
    "use_cls_token": (False, "class tokens in dense models"),
    "drop_rate": (0.0, "dropout in a branch"),
    "attn_drop_rate": (0.0, "attention dropout in a branch"),
    "in_chans": (3, "images with other than 3 channels"),
    "qk_scale": (None, "a fixed attention scale"),
}
_VIT_FIELDS = {"depth", "embed_dim", "num_heads", "mlp_ratio", "patch_size", "qkv_bias", "pretrain_img_size"}
_BRANCH_FIELDS = {"real_size", "interaction_indexes", "drop_path_rate", "window_attn", "window_size", "use_flash_attn"}
_BRANCH_FIELDS |= {"init_scale", "init_values", "out_indices"}
_TOP_FIELDS = {"n_points", "deform_num_heads", "with_cffn", "cffn_ratio", "deform_ratio", "is_dino", "norm_layer"}
_TOP_FIELDS |= {"interaction_proj", "interact_attn_type", "interaction_drop_path_rate", "with_simple_fpn"}
_TOP_FIELDS |= {"out_interaction_indexes"}

# Defaults of the public classes, where a config may leave the field out
_VIT_DEFAULTS = {
    "deit": {
        "depth": 12,
        "embed_dim": 768,
        "num_heads": 12,
        "patch_size": 16,
        "init_scale": 1e-4,
        "use_flash_attn": False,
    },
    "internvit": {
        "depth": 48,
        "embed_dim": 3200,
        "num_heads": 25,
        "patch_size": 14,
        "init_values": 0.1,
        "window_size": 14,
        "qk_normalization": True,
        "norm_layer_type": "RMSNorm",
    },
}
_COMMON_DEFAULTS = {"mlp_ratio": 4.0, "qkv_bias": False, "pretrain_img_size": 224, "drop_path_rate": 0.0}


@dataclass(frozen=True)
class PublishedModel:
    """A published backbone: our configuration of it and the naming classes of its branches."""

    config: PIIPConfig
    branch_classes: tuple[str, ...]


def config_from_public(
    public: Mapping[str, Any], state_shapes: Shapes, *, branch4_built_from: str | None = None
) -> PublishedModel:
    """Reads a published configuration.

    The family of a branch comes from the parameters it has, since the public one hides in a file name.

    Args:
        public: Fields of the public backbone class: `branch1`, `branch2`, ..., `n_points` and so on; for a
            single-branch baseline the fields of the branch itself.
        state_shapes: Shapes of the published state dict below the backbone.
        branch4_built_from: "branch3 config" if Branch 4 takes all but `real_size` and `interaction_indexes` from
            Branch 3 (what the public class does), "branch4 config" if not. None decides by the shapes.

    Raises:
        NotSupportedYet: For families, fields or values that our configuration cannot express.
        CheckpointError: If the parameters do not belong to such a configuration.
    """
    numbers = sorted(int(key.removeprefix("branch")) for key in public if _is_branch(key))
    if not numbers:
        return _single_branch(public, state_shapes)
    if numbers != list(range(1, len(numbers) + 1)):
        raise CheckpointError(f"branches {numbers}: expected branch1 to branch{len(numbers)}")
    _check_fields({key for key in public if not _is_branch(key)}, _TOP_FIELDS | _RUNTIME_FIELDS)
    classes = tuple(branch_class_of(branch_keys(state_shapes, number)) for number in numbers)
    settings = {number: dict(public[f"branch{number}"]) for number in numbers}
    if len(numbers) == 4:
        settings[4] = _fourth_branch(settings[3], settings[4], state_shapes, branch4_built_from)
    branches = tuple(_branch(settings[n], c, multi=True) for n, c in zip(numbers, classes, strict=True))
    config = PIIPConfig(
        branches=branches,
        interaction=_interaction(public, len(public["branch1"]["interaction_indexes"])),
        merging=_merging(public),
    )
    return PublishedModel(config, classes)


def branch_keys(keys: Collection[str], number: int | None) -> list[str]:
    """Names below a branch of a published backbone; all of them for a single-branch one (`number` None)."""
    prefix = "" if number is None else f"branch{number}."
    found = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    if not found:
        raise CheckpointError(
            f"no parameter starts with {prefix!r}: the file has fewer branches than the configuration"
        )
    return found


def _is_branch(key: str) -> bool:
    return key.startswith("branch") and key.removeprefix("branch").isdigit()


def _check_fields(fields: Collection[str], known: Collection[str]) -> None:
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise NotSupportedYet(f"public configuration field {', '.join(unknown)}")


def _single_branch(public: Mapping[str, Any], shapes: Shapes) -> PublishedModel:
    branch_class = branch_class_of(branch_keys(shapes, None))
    depth = public.get("depth", _VIT_DEFAULTS[branch_class]["depth"])
    outputs = public.get("out_indices", [depth - 1])
    simple = public.get("use_simple_fpn", True)
    if not (simple and public.get("with_fpn", True)) or outputs[-1] != depth - 1:
        raise NotSupportedYet("a single-branch feature pyramid not made from the last block")
    settings = {"real_size": public.get("img_size", public.get("pretrain_img_size", 224)), **public}
    config = PIIPConfig(
        branches=(_branch(settings, branch_class, multi=False),),
        interaction=InteractionConfig(num_interactions=0),
        merging=MergingConfig(kind="single", pyramid_norm="layer"),
    )
    return PublishedModel(config, (branch_class,))


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
    keys = branch_keys(shapes, 4)
    depth = len({key.split(".")[1] for key in keys if key.startswith("blocks.")})
    width = shapes["branch4.patch_embed.proj.weight"][0]
    return (width, depth) == (settings["embed_dim"], settings["depth"])


def _branch(settings: Mapping[str, Any], branch_class: str, *, multi: bool) -> BranchConfig:
    _check_fields(settings, _VIT_FIELDS | _BRANCH_FIELDS | _RUNTIME_FIELDS | set(_FIXED_FIELDS))
    values = {**_COMMON_DEFAULTS, **_VIT_DEFAULTS[branch_class], **settings}
    for field, (supported, feature) in _FIXED_FIELDS.items():
        if values.get(field, supported) != supported:
            raise NotSupportedYet(feature)
    internvit = branch_class == "internvit"
    network = ViTConfig(
        embed_dim=values["embed_dim"],
        depth=values["depth"],
        num_heads=values["num_heads"],
        mlp_ratio=float(values["mlp_ratio"]),
        patch_size=values["patch_size"],
        qkv_bias=values["qkv_bias"],
        pos_grid=values["pretrain_img_size"] // values["patch_size"],
        layer_scale=values["init_values" if internvit else "init_scale"],
    )
    # The flash-attention path of the DeiT class pads before the projection, the other one behind it; the InternViT
    # class has only the former
    before = internvit or values["use_flash_attn"]
    return BranchConfig(
        network=network,
        image_size=values["real_size"],
        segments=tuple(map(tuple, values["interaction_indexes"])) if multi else None,
        window_size=_windows(values),
        window_padding="before_qkv" if before else "after_qkv",
        drop_path_rate=values["drop_path_rate"],
        drop_path_schedule="linear" if internvit else "constant",
    )


def _windows(values: Mapping[str, Any]) -> tuple[int | None, ...]:
    def per_block(field: str, default: Any) -> list[Any]:
        value = values.get(field)
        value = default if value is None else value
        return list(value) if isinstance(value, (list, tuple)) else [value] * values["depth"]

    flags, sizes = per_block("window_attn", False), per_block("window_size", -1)
    return tuple(size if flag and size > 0 else None for flag, size in zip(flags, sizes, strict=True))


def _interaction(public: Mapping[str, Any], count: int) -> InteractionConfig:
    kinds = {"deform": "deformable", "normal": "regular"}
    kind = public.get("interact_attn_type", "normal")
    if kind not in kinds:
        raise NotSupportedYet(f"interact_attn_type={kind!r}")
    norm = public.get("norm_layer", "ln")
    if norm not in ("ln", "none"):
        raise NotSupportedYet(f"norm_layer={norm!r}")
    return InteractionConfig(
        num_interactions=count,
        attention=kinds[kind],
        num_heads=public.get("deform_num_heads", 6),
        num_points=public.get("n_points", 4),
        value_ratio=public.get("deform_ratio", 1.0),
        projection=public.get("interaction_proj", True),
        norm="none" if norm == "none" else "layernorm",
        ffn=public.get("with_cffn", False),
        ffn_ratio=public.get("cffn_ratio", 0.25),
        drop_path_rate=public.get("interaction_drop_path_rate", 0.3),
    )


def _merging(public: Mapping[str, Any]) -> MergingConfig:
    is_dino = public.get("is_dino", False)
    strides = (8, 16, 32) if is_dino else (4, 8, 16, 32)
    if public.get("with_simple_fpn", True):
        return MergingConfig(out_strides=strides)
    if is_dino:
        raise NotSupportedYet("is_dino together with with_simple_fpn=False")
    return MergingConfig(kind="regular", intermediate_after=tuple(public.get("out_interaction_indexes", ())))
