"""Registers the classifiers of the zoo in timm."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from timm.models import (
    DefaultCfg,
    adapt_input_conv,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from ... import zoo
from ...branches import ViTConfig
from ...checkpoints import fetch_released, from_published, load_pretrained
from ...classifier import PIIPClassifier, feature_maps, with_pooling
from ...config import BranchConfig, ClassifierConfig, InteractionConfig, PIIPConfig
from ...errors import CheckpointError, check

# Where a released file has the weights that a tag names
_WEIGHTS = {"in1k": "model", "in1k_ema": "model_ema"}


@dataclasses.dataclass(frozen=True)
class _Model:
    """Two forms of a model: for new training, and as published. They are the same where nothing was published."""

    training: ClassifierConfig
    published: ClassifierConfig
    url: str | None = None


MODELS: dict[str, _Model] = {}
"""Every registered model by name."""

# timm looks for this name in the module of an entry point
default_cfgs: dict[str, DefaultCfg] = {}


def register_classifier(
    name: str, config: ClassifierConfig, *, published: ClassifierConfig | None = None, url: str | None = None
) -> None:
    """Makes a classifier known to `timm.create_model`; for pyramids of your own, too.

    Args:
        name: Name in timm.
        config: The form for new training.
        published: The form of released weights; None if it is the same.
        url: Address of the released weights.
    """
    MODELS[name] = _Model(config, published or config, url)
    tags = _WEIGHTS if url else ("untrained",)
    default_cfgs.update(generate_default_cfgs({f"{name}.{tag}": _pretrained_cfg(MODELS[name]) for tag in tags}))
    globals()[name] = register_model(_entry_point(name))


def model_names() -> list[str]:
    """Names of the models that `timm.create_model` knows from here."""
    return list(MODELS)


def create_classifier(
    name: str,
    pretrained: bool = False,
    *,
    published: bool | None = None,
    pretrained_branches: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """What `timm.create_model(name, ...)` calls.

    Args:
        name: One of `model_names()`.
        pretrained: Load the released weights (see `fetch_released`; of the tag `in1k_ema` their moving average), or
            those that `pretrained_cfg_overlay=dict(file=...)` names, which are converted.
        published: Build the released form, whose heads read the first patch token and whose weights need that; else
            the form for new training, whose heads read class tokens. None: the released form if its weights are to be
            downloaded. True goes with a released file of your own in `pretrained_cfg_overlay`.
        pretrained_branches: Start every branch and its head from the network that it is named after, as the published
            fine-tuning does; interactions start as identity.
        **kwargs: Of timm: `num_classes`, `in_chans`, `global_pool` ("token", "avg", "first_patch", or "" with no
            classes: see `PIIPClassifier.unpooled`), `drop_rate`, `drop_path_rate` (all branches and interactions; None
            keeps the published rates), `img_size` (no effect: the network takes images of any size), `device`, `dtype`,
            `features_only`, `out_indices`, `pretrained_cfg`, `pretrained_cfg_overlay` and `cache_dir`.

    Raises:
        ConfigError: If an argument has a value that is not possible.
        CheckpointError: If the weights do not fit.
    """
    source = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    downloads = pretrained and not (source.file or source.state_dict or source.source or source.hf_hub_id)
    published = downloads if published is None else published
    if downloads and source.url in {model.url for model in zoo.released_models()}:
        file = str(fetch_released(name, ema=source.tag == "in1k_ema"))
        kwargs["pretrained_cfg_overlay"] = {**(kwargs.get("pretrained_cfg_overlay") or {}), "file": file}
    config = MODELS[name].published if published else MODELS[name].training
    if kwargs.get("features_only") and config.head == "separate":
        kwargs.setdefault("global_pool", "avg")  # with the last interaction, which class tokens would not need
    final = tuple(i for i, info in enumerate(feature_maps(config.pyramid)) if info["final"])
    try:
        model = build_model_with_cfg(
            partial(_build, config, pretrained_branches and not pretrained),
            name,
            pretrained,
            pretrained_filter_fn=convert_weights,
            feature_cfg={"out_indices": final, "feature_cls": "getter"},
            **kwargs,
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"the weights of {name} hold more than tensors and could run code when loaded "
            f"({str(error).splitlines()[0]}). If you trust where they come from, download the file, convert it once "
            "with tools/convert_checkpoint.py --unsafe-pickle, and pass pretrained_cfg_overlay=dict(file=CONVERTED) "
            "with published=True"
        ) from None
    remember_argument(model, "published", published)
    return model


def remember_argument(model: nn.Module, name: str, value: Any) -> None:
    """Has timm store an argument with the weights, and pass it when it loads them.

    timm's factory stores what it was given, and not what followed from it; its functions for saving take such arguments
    from whoever calls them alone. Seen working with timm 1.0.31.
    """
    vars(model)["_model_args"] = {name: value}


def _build(
    config: ClassifierConfig,
    pretrained_branches: bool,
    *,
    num_classes: int,
    in_chans: int = 3,
    global_pool: str | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float | None = None,
    img_size: int | tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> PIIPClassifier:
    """The model that timm's arguments describe; `img_size` is noted by timm."""
    check(in_chans > 0, "in_chans", in_chans, "a positive number of channels")
    config = dataclasses.replace(config, num_classes=num_classes, drop_rate=drop_rate)
    if global_pool is not None:
        config = with_pooling(config, global_pool or "avg")
    if drop_path_rate is not None:
        branches = (dataclasses.replace(branch, drop_path_rate=drop_path_rate) for branch in config.pyramid.branches)
        interaction = dataclasses.replace(config.pyramid.interaction, drop_path_rate=drop_path_rate)
        pyramid = dataclasses.replace(config.pyramid, branches=tuple(branches), interaction=interaction)
        config = dataclasses.replace(config, pyramid=pyramid)
    model = PIIPClassifier(config)
    if pretrained_branches:
        load_pretrained(model)
    for name in _first_convs(config.pyramid) if in_chans != 3 else ():
        conv = cast(nn.Conv2d, model.get_submodule(name))
        model.in_chans = conv.in_channels = in_chans
        conv.weight = nn.Parameter(adapt_input_conv(in_chans, conv.weight.detach()))
    if global_pool == "":
        model.reset_classifier(num_classes, "")
    return model.to(device=device, dtype=dtype)


def _first_convs(config: PIIPConfig) -> tuple[str, ...]:
    """The convolution of each branch that reads the image: a stem's, or that of the patches."""
    staged = [len(set(branch.network.strides)) > 1 for branch in config.branches]
    return tuple(
        f"pyramid.branches.{index}.model.{'stem.0' if stem else 'patch_embed.proj'}"
        for index, stem in enumerate(staged)
    )


def convert_weights(state: Mapping[str, Any], model: PIIPClassifier) -> dict[str, Tensor]:
    """Weights of a file under our names; timm's hook for checkpoints of other formats.

    Args:
        state: Our state dict, a published one, or a whole released file.
        model: The model they are for, as timm builds it.

    Raises:
        CheckpointError: If they do not fit the form of the model.
    """
    cfg, target = vars(model)["pretrained_cfg"], model.state_dict()
    name = cfg["architecture"]
    state = dict(state.get(_WEIGHTS.get(cfg.get("tag"), "model"), state))
    if not state.keys() & target.keys():
        state, report = from_published(state, MODELS[name].published, source=f"weights for {name}")
        report.check()
    adapted = {
        f"{module}.{part}" for key in ("classifier", "first_conv") for module in cfg[key] for part in ("weight", "bias")
    }
    shapes = {key: tensor.shape for key, tensor in target.items()}
    wrong = sorted(key for key, tensor in state.items() if shapes.get(key) != tensor.shape and key not in adapted)
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors of the weights for {name} do not fit this form of it ({', '.join(wrong[:3])} ...): "
            "released weights need published=True and no global_pool='token', others the arguments of their training"
        )
    return state


def _pretrained_cfg(model: _Model) -> dict[str, Any]:
    config = model.training
    separate = tuple(f"head.classifiers.{number}" for number, _ in enumerate(config.pyramid.branches, 1))
    return {
        "url": model.url,
        "num_classes": config.num_classes,
        "input_size": (3, config.image_size, config.image_size),
        "crop_pct": 1.0,
        "first_conv": _first_convs(config.pyramid),
        "classifier": separate if config.head == "separate" else ("head.classifier",),
        "paper_name": "Parameter-Inverted Image Pyramid Networks for Visual Perception and Multimodal Understanding",
        "paper_ids": "arXiv:2501.07783",
    }


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create_classifier(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name}; see `create_classifier`."
    return create


def _tiny() -> ClassifierConfig:
    """Three branches of 4, 2 and 2 blocks: `piip_test`, for tests, as timm has test models."""
    sizes = ((48, 4, 4, 32), (32, 2, 4, 48), (16, 2, 2, 96))
    branches = (
        BranchConfig(
            network=ViTConfig(
                embed_dim=dim,
                depth=depth,
                num_heads=heads,
                patch_size=8,
                pos_grid=side // 8,
                layer_scale=None,
                class_token=True,
                class_position=True,
            ),
            image_size=side,
        )
        for dim, depth, heads, side in sizes
    )
    interaction = InteractionConfig(num_interactions=2, num_heads=4)
    return ClassifierConfig(pyramid=PIIPConfig(branches=tuple(branches), interaction=interaction, merging=None))


_URLS = {model.name: model.url for model in zoo.released_models()}
for _entry in zoo.classification_entries():
    register_classifier(_entry.name, _entry.training_config, published=_entry.config, url=_URLS.get(_entry.name))
register_classifier("piip_test", _tiny())
