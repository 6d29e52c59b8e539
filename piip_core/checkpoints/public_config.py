"""Vision towers in the public field names (`backbone=dict(...)` of published configs) to our `PIIPConfig`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from ..branches import ConvNeXtConfig, NetworkConfig, ViTConfig
from ..config import BranchConfig, InteractionConfig, PIIPConfig
from ..errors import CheckpointError, NotSupportedYet
from .branch_names import branch_classes_of, branch_prefix

Shapes = Mapping[str, Sequence[int]]
Settings = Mapping[str, Any]
Reader = Callable[[Settings, Shapes], tuple[NetworkConfig, dict[str, Any]]]
"""Makes a network and further fields of `BranchConfig` of a branch's settings and the shapes of its parameters."""

_BRANCH = re.compile(r"branch\d+")
# Fields without influence on what the network computes in evaluation, or on its parameters
_RUNTIME_FIELDS = {"type", "cal_flops", "output_dtype", "model_cls", "unfreeze", "use_branch_merging"}
_TOP_FIELDS = {"n_points", "deform_num_heads", "with_cffn", "cffn_ratio", "deform_ratio", "is_dino", "norm_layer"}
_TOP_FIELDS |= {"interaction_proj", "interact_attn_type", "interaction_drop_path_rate", "with_simple_fpn"}
_TOP_FIELDS |= {"out_interaction_indexes"}
BRANCH_FIELDS = {"type", "pretrained", "with_cp", "cal_flops", "output_dtype", "layerscale_force_fp32"}
BRANCH_FIELDS |= {"with_fpn", "pretrain_patch_size", "img_size", "use_simple_fpn", "out_indices"}
BRANCH_FIELDS |= {"real_size", "interaction_indexes", "drop_path_rate"}


def config_from_public(
    public: Settings, state_shapes: Shapes, readers: Mapping[str, Reader] | None = None
) -> PIIPConfig:
    """Reads a published configuration of several branches, without merging.

    The family of a branch comes from the parameters it has, since the public one hides in a file name.

    Args:
        public: Fields of the public backbone class: `branch1`, `branch2`, ..., `n_points` and so on. `clip_config` of a
            branch may hold what transformers' configuration of a CLIP says, of which public settings only give the
            name.
        state_shapes: Shapes of the published state dict below the backbone.
        readers: By published class of the branch; None for those that multimodal models have.

    Raises:
        NotSupportedYet: For families, fields or values that our configuration cannot express.
        CheckpointError: If the parameters do not belong to such a configuration.
    """
    readers = READERS if readers is None else readers
    numbers = sorted(int(key.removeprefix("branch")) for key in public if _BRANCH.fullmatch(key))
    if len(numbers) < 2 or numbers != list(range(1, len(numbers) + 1)):
        raise CheckpointError(f"branches {numbers}: expected branch1 to branchN of at least two")
    check_fields([key for key in public if not _BRANCH.fullmatch(key)], _TOP_FIELDS | _RUNTIME_FIELDS)
    branches = []
    for number, branch_class in zip(numbers, branch_classes_of(state_shapes, len(numbers)), strict=True):
        settings, prefix = public[f"branch{number}"], branch_prefix(number, len(numbers))
        shapes = {key.removeprefix(prefix): s for key, s in state_shapes.items() if key.startswith(prefix)}
        if branch_class not in readers:
            raise NotSupportedYet(f"branches of the published class {branch_class} here")
        network, options = readers[branch_class](settings, shapes)
        branches.append(branch_of(network, settings, segments=settings["interaction_indexes"], **options))
    interaction = _interaction(public, len(public["branch1"]["interaction_indexes"]))
    return PIIPConfig(branches=tuple(branches), interaction=interaction, merging=None)


def branch_of(network: NetworkConfig, settings: Settings, **options: Any) -> BranchConfig:
    """A branch with the settings that all published classes have."""
    return BranchConfig(
        network=network,
        image_size=settings["real_size" if "real_size" in settings else "img_size"],
        drop_path_rate=settings.get("drop_path_rate", 0.0),
        **options,
    )


def check_fields(fields: Collection[str], known: Collection[str]) -> None:
    """Raises NotSupportedYet for fields that are not known."""
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise NotSupportedYet(f"public configuration field {', '.join(unknown)}")


def _interaction(public: Mapping[str, Any], count: int) -> InteractionConfig:
    kinds: dict[str, Literal["deformable", "regular"]] = {"deform": "deformable", "normal": "regular"}
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


def _read_convnext(settings: Settings, shapes: Shapes) -> tuple[ConvNeXtConfig, dict[str, Any]]:
    check_fields(settings, BRANCH_FIELDS | {"downsample_ratios", "model_type"})
    scales: dict[int, list[int]] = {}
    for key, shape in shapes.items():
        match key.split("."):
            case ["convnext_model", "stages", stage, "blocks", _, "weight"]:
                scales.setdefault(int(stage), []).append(shape[0])
    return convnext_of_stages(settings, scales), {"drop_path_schedule": "linear"}


def convnext_of_stages(settings: Settings, scales: Mapping[int, Sequence[int]]) -> ConvNeXtConfig:
    """From the widths of the layer scales in each stage."""
    stages = [scales[stage] for stage in sorted(scales)]
    network = ConvNeXtConfig(depths=tuple(map(len, stages)), stage_dims=tuple(dims[0] for dims in stages))
    ratios = settings.get("downsample_ratios")
    if ratios is not None and tuple(ratios) != network.strides:
        raise NotSupportedYet(f"downsample_ratios={list(ratios)}")
    return network


def _read_clip(settings: Settings, shapes: Shapes) -> tuple[ViTConfig, dict[str, Any]]:
    """Sizes that shapes do not tell are those of every released CLIP, unless `clip_config` has others."""
    own = {"model_type", "clip_config", "use_cls_token", "pretrain_patch_size", "patch_size"}
    check_fields(settings, BRANCH_FIELDS | own)
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


READERS: Mapping[str, Reader] = {
    "clip": _read_clip,
    "convnext_timm": _read_convnext,
    "convnext_timm_mlp": _read_convnext,
}
"""By published class, as in `BRANCH_CLASSES`: the classes of multimodal models."""
