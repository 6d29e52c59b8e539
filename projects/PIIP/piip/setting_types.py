"""What types settings have, for overrides and, under Detectron2's own script, for the finished configuration."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue

from piip_core.errors import ConfigError

_RESOLVER = "piip.checked"
_warn_once = functools.cache(logging.getLogger(__name__).warning)

Kinds = tuple[Any, ...]
"""The types that a setting may have; `object` for anything."""

_SETTINGS: dict[str, Kinds] = {
    "train.output_dir": (str,),
    "train.init_checkpoint": (str, NoneType),
    "train.device": (str,),
    "train.max_iter": (int,),
    "train.epochs": (float,),
    "train.warmup_epochs": (float,),
    "train.eval_period": (int,),
    "train.log_period": (int,),
    "train.seed": (int,),
    "train.clip_norm": (float,),
    "train.load_pretrained": (bool,),
    "train.amp.enabled": (bool,),
    "train.amp.precision": (str,),
    "train.amp.float32_heads": (bool,),
    "train.eval_precision": (str,),
    "train.ddp.broadcast_buffers": (bool,),
    "train.ddp.find_unused_parameters": (bool,),
    "train.ddp.fp16_compression": (bool,),
    "train.checkpointer.period": (int,),
    "train.checkpointer.max_to_keep": (int, NoneType),
    "train.ema.decay": (float, NoneType),
    "train.ema.use_warmup": (bool,),
    "train.best.metric": (str, NoneType),
    "train.best.patience": (int, NoneType),
    "train.micro_batch": (int, NoneType),
    "train.freeze": (str, NoneType),
    "train.lora": (int, NoneType),
    "train.report": (bool,),
    "train.track": (str,),
    "train.deepspeed.stage": (int,),
    "train.deepspeed.offload_optimizer": (bool,),
    "train.deepspeed.offload_parameters": (bool,),
    "train.deepspeed.bucket_size": (int,),
    "train.deepspeed.config": (str, NoneType),
    "data.kind": (str,),
    "data.train.annotations": (str,),
    "data.train.images": (str,),
    "data.train.labels": (str,),
    "data.train.crop": (int, list),
    "data.test.annotations": (str, NoneType),
    "data.test.images": (str, NoneType),
    "data.test.labels": (str, NoneType),
    "data.test.share": (float,),
    "data.classes": (int, str, list),
    "data.reduce_zero_label": (bool, NoneType),
    "data.num_classes": (int,),
    "data.names_from": (str, NoneType),
}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a group of settings",
    NoneType: "null",
}
_BOOLEANS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


def setting_kinds(cfg: DictConfig, key: str) -> Kinds:
    """The types of a setting such as "train.max_iter": as listed here, otherwise that of its present value."""
    if key in _SETTINGS:
        return _SETTINGS[key]
    if key.endswith(".use_act_checkpoint"):
        return (bool, str)  # true, false or cheap
    default, parent = OmegaConf.select(cfg, key), OmegaConf.select(cfg, key.rpartition(".")[0])
    if type(default) is int and isinstance(parent, DictConfig) and "_target_" in parent:
        return (int, float)  # an argument may well be 1 in one configuration and 0.5 in another
    return _kinds_like(default)


def _kinds_like(default: Any) -> Kinds:
    if isinstance(default, DictConfig):
        return (dict, NoneType) if "_target_" in default else (dict,)
    if isinstance(default, str):
        return (str, NoneType)
    kind = list if isinstance(default, ListConfig) else type(default)
    return (kind,) if kind in (bool, int, float, list) else (object,)


def convert(value: Any, kinds: Kinds, default: Any, key: str, written: str | None = None) -> Any:
    """A value in one of the types: "no" as False, 1e3 as 1000, 2024_01 as text where those are expected.

    What was `written` is known but for values within others; `default` tells the types of the elements of a list.

    Raises:
        ConfigError: If it cannot be meant.
    """
    number = type(value) in (int, float)
    looks_like_text = type(value) is bool or (number and (int not in kinds or str(value) != written))
    if str in kinds and bool not in kinds and written and looks_like_text:
        return written
    for kind in kinds:
        if kind is bool and str(value).lower() in _BOOLEANS:
            return _BOOLEANS[str(value).lower()]
        if kind is int and number and float(value).is_integer():
            return int(value)
        if kind is float and number and value == value:  # nan is no number
            return value
        if kind is list and isinstance(value, list | ListConfig):
            return _convert_elements(value, default, key)
        if kind is object or (kind in (str, NoneType) and isinstance(value, kind)):
            return value
        if kind is dict and isinstance(value, DictConfig):
            return value
    raise _unexpected(key, value if written is None else written, kinds, number)


def _convert_elements(values: Sequence[Any], default: Any, key: str) -> list[Any]:
    kinds = {_kinds_like(element) for element in default} if isinstance(default, ListConfig) else set()
    if len(kinds) != 1:
        return list(values)
    (kind,) = kinds
    return [convert(value, kind, default[0], f"{key}.{index}") for index, value in enumerate(values)]


def _unexpected(key: str, value: Any, kinds: Kinds, number: bool) -> ConfigError:
    quote = f" (text that looks like a number is quoted twice: '{key}=\"...\"')" if number and str in kinds else ""
    expected = " or ".join(_WORDS[kind] for kind in kinds)
    return ConfigError(f"{key}={'null' if value is None else value}: expected {expected}{quote}")


# ---- Detectron2's own script ----


def register_check() -> None:
    """Makes `${piip.checked:VALUE}` known to OmegaConf: VALUE, after a check of the whole configuration.

    Our data loaders say it for Detectron2's own script, which checks nothing but looks at every value before it starts.
    """
    OmegaConf.register_new_resolver(_RESOLVER, _checked, replace=True)


def leave_unchecked() -> None:
    """Makes it VALUE alone: the overrides were checked."""
    OmegaConf.register_new_resolver(_RESOLVER, lambda value: value, replace=True)


def _checked(value: Any, *, _root_: DictConfig) -> Any:
    leave_unchecked()  # the check comes across itself
    try:
        for key, found, kinds in _typed_settings(_root_):
            if not _has_kind(found, kinds):
                raise _unexpected(key, found, kinds, type(found) in (int, float))
    finally:
        register_check()
    if unused := _without_effect(_root_.get("train", {})):
        _warn_once(
            "Settings without effect in Detectron2's own script: %s. tools/lazyconfig_train_net.py of this project "
            "follows them",
            ", ".join(unused),
        )
    return value


def _typed_settings(cfg: DictConfig) -> Iterator[tuple[str, Any, Kinds]]:
    """Key, value and types of the settings listed here, and of arguments of our own classes and functions."""
    pending: list[tuple[str, Any]] = [("", cfg)]
    while pending:
        prefix, node = pending.pop()
        annotated = _annotated(node) if isinstance(node, DictConfig) and "_target_" in node else {}
        for name in range(len(node)) if isinstance(node, ListConfig) else list(node):
            key = f"{prefix}{name}"
            try:
                value = node[name]
            except (MissingMandatoryValue, InterpolationResolutionError):  # OmegaConf's own, where it is used
                continue
            if key in _SETTINGS:
                yield key, value, _SETTINGS[key]
            elif value is not None:  # what is null elsewhere is often not built at all
                yield key, value, annotated.get(name, (object,))
            if OmegaConf.is_config(value):
                pending.append((f"{key}.", value))


def _annotated(node: DictConfig) -> dict[str, Kinds]:
    """Types of the plain arguments of a LazyCall's target, if it is ours."""
    target = locate(node._target_) if isinstance(node._target_, str) else node._target_
    if getattr(target, "__module__", "").split(".")[0] not in ("piip", "piip_core"):
        return {}
    try:
        parameters = inspect.signature(target, eval_str=True).parameters
    except NameError:  # an annotation of what is imported for type checkers only
        return {}
    found = {}
    for name, parameter in parameters.items():
        hint = parameter.annotation
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if all(kind in _WORDS for kind in kinds):
            found[name] = tuple(kinds)
    return found


def _has_kind(value: Any, kinds: Kinds) -> bool:
    if object in kinds or (isinstance(value, DictConfig) and "_target_" in value):
        return True
    plain = {ListConfig: list, DictConfig: dict}.get(type(value), type(value))
    return plain in kinds or (plain is int and float in kinds)


def _without_effect(train: DictConfig) -> list[str]:
    select = functools.partial(OmegaConf.select, train)
    notes = {
        "amp.precision": select("amp.enabled") and " (mixed precision is float16 there)",
        "amp.float32_heads": select("amp.float32_heads") and "",
        "eval_precision": "" if select("eval_precision", default="float32") != "float32" else None,
        "clip_norm": select("clip_norm") and "",
        "ema.decay": None if select("ema.decay") is None else "",
        "best.metric": select("best.metric") and "",
        "micro_batch": select("micro_batch") and "",
        "freeze": select("freeze") and "",
        "deepspeed.stage": select("deepspeed.stage") and "",
        "seed": select("seed", default=-1) >= 0 and " (a resumed run does not go on with its order)",
    }
    return [f"train.{key}={select(key)}{note}" for key, note in notes.items() if isinstance(note, str)]


register_check()
