"""Configurations in the public field names (the `backbone=dict(...)` of published configs) to our `PIIPConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import ClassifierConfig, InteractionConfig, MergingConfig, PIIPConfig
from ..errors import CheckpointError, NotSupportedYet
from .branch_names import branch_class_of
from .public_branches import Shapes, branch_from_public, check_fields, num_blocks

__all__ = ["PublishedModel", "branch_shapes", "classifier_from_public", "config_from_public"]

# Fields without influence on what the network computes in evaluation, or on its parameters
_RUNTIME_FIELDS = {"type", "cal_flops", "output_dtype", "model_cls", "unfreeze", "use_branch_merging"}
_TOP_FIELDS = {"n_points", "deform_num_heads", "with_cffn", "cffn_ratio", "deform_ratio", "is_dino", "norm_layer"}
_TOP_FIELDS |= {"interaction_proj", "interact_attn_type", "interaction_drop_path_rate", "with_simple_fpn"}
_TOP_FIELDS |= {"out_interaction_indexes"}


@dataclass(frozen=True)
class PublishedModel:
    """A published backbone or classifier: our configuration of it and the naming classes of its branches."""

    config: PIIPConfig | ClassifierConfig
    branch_classes: tuple[str, ...]


def config_from_public(
    public: Mapping[str, Any],
    state_shapes: Shapes,
    *,
    merging: bool = True,
    classifies: bool = False,
    branch4_built_from: str | None = None,
) -> PublishedModel:
    """Reads a published configuration.

    The family of a branch comes from the parameters it has, since the public one hides in a file name.

    Args:
        public: Fields of the public backbone class: `branch1`, `branch2`, ..., `n_points` and so on; for a
            single-branch baseline the fields of the branch itself.
        state_shapes: Shapes of the published state dict below the backbone.
        merging: Whether merging and feature pyramid belong to it; not so in multimodal models.
        classifies: Whether it belongs to a classifier, whose branches may keep their class tokens.
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
    check_fields({key for key in public if not _is_branch(key)}, _TOP_FIELDS | _RUNTIME_FIELDS)
    shapes = {number: branch_shapes(state_shapes, number) for number in numbers}
    classes = {number: branch_class_of(list(shapes[number])) for number in numbers}
    settings = {number: dict(public[f"branch{number}"]) for number in numbers}
    if len(numbers) == 4:
        settings[4] = _fourth_branch(settings[3], settings[4], shapes[4], branch4_built_from)
    branches = tuple(
        branch_from_public(settings[n], classes[n], shapes[n], multi=True, classifies=classifies) for n in numbers
    )
    config = PIIPConfig(
        branches=branches,
        interaction=_interaction(public, len(public["branch1"]["interaction_indexes"])),
        merging=_merging(public) if merging else None,
    )
    return PublishedModel(config, tuple(classes.values()))


def classifier_from_public(public: Mapping[str, Any], state_shapes: Shapes) -> PublishedModel:
    """Reads the configuration of a published classifier; arguments and errors are those of `config_from_public`."""
    fields = dict(public)
    separate = fields.pop("separate_head", False)
    backbone = config_from_public(fields, state_shapes, merging=False, classifies=True)
    classifier = state_shapes["branch1.head.bias" if separate else "cls_head.bias"]
    config = ClassifierConfig(
        pyramid=backbone.config,
        num_classes=classifier[0],
        head="separate" if separate else "merged",
        pooling="first_patch" if separate else "average",
    )
    return PublishedModel(config, backbone.branch_classes)


def branch_shapes(shapes: Shapes, number: int | None) -> dict[str, tuple[int, ...]]:
    """What is below a branch of a published backbone; all of it for a single-branch one (`number` None)."""
    prefix = "" if number is None else f"branch{number}."
    found = {key.removeprefix(prefix): tuple(shape) for key, shape in shapes.items() if key.startswith(prefix)}
    if not found:
        raise CheckpointError(
            f"no parameter starts with {prefix!r}: the file has fewer branches than the configuration"
        )
    return found


def _is_branch(key: str) -> bool:
    return key.startswith("branch") and key.removeprefix("branch").isdigit()


def _single_branch(public: Mapping[str, Any], shapes: Shapes) -> PublishedModel:
    branch_class = branch_class_of(list(shapes))
    settings = {"real_size": public.get("img_size", public.get("pretrain_img_size", 224)), **public}
    branch = branch_from_public(settings, branch_class, shapes, multi=False)
    last = branch.network.depth - 1
    if branch_class == "convnext":
        merging = MergingConfig(kind="single", out_blocks=branch.network.last_blocks())
    elif public.get("use_simple_fpn", True) and public.get("with_fpn", True):
        if public.get("out_indices", [last])[-1] != last:
            raise NotSupportedYet("a single-branch feature pyramid not made from the last block")
        merging = MergingConfig(kind="single", pyramid_norm="layer")
    else:
        raise NotSupportedYet("a single-branch feature pyramid not made from the last block")
    config = PIIPConfig(branches=(branch,), interaction=InteractionConfig(num_interactions=0), merging=merging)
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
    width = shapes["patch_embed.proj.weight"][0]
    return (width, num_blocks(shapes)) == (settings["embed_dim"], settings["depth"])


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
