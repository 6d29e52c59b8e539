"""What types settings have: those of `train` and `data` are listed here, those of LazyCalls their targets annotate."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue

from piip_core.errors import ConfigError

__all__ = ["arguments", "check_settings", "expected_type", "fit", "register", "target_of", "unregister"]

_RESOLVER = "piip.checked"

_warn_once = functools.cache(logging.getLogger(__name__).warning)

_SETTINGS: dict[str, Any] = {
    "train.output_dir": str,
    "train.init_checkpoint": str | None,
    "train.device": str,
    "train.max_iter": int,
    "train.epochs": float,
    "train.warmup_epochs": float,
    "train.eval_period": int,
    "train.log_period": int,
    "train.seed": int,
    "train.clip_norm": float,
    "train.load_pretrained": bool,
    "train.amp.enabled": bool,
    "train.amp.precision": str,
    "train.ddp.broadcast_buffers": bool,
    "train.ddp.find_unused_parameters": bool,
    "train.ddp.fp16_compression": bool,
    "train.checkpointer.period": int,
    "train.checkpointer.max_to_keep": int | None,
    "train.ema.decay": float | None,
    "train.ema.use_warmup": bool,
    "train.deepspeed.stage": int,
    "train.deepspeed.offload_optimizer": bool,
    "train.deepspeed.offload_parameters": bool,
    "train.deepspeed.bucket_size": int,
    "train.deepspeed.config": str | None,
    "data.kind": str,
    "data.train.annotations": str,
    "data.train.images": str,
    "data.train.labels": str,
    "data.train.scales": list[list[int]],
    "data.train.scale": list[int],
    "data.train.ratio_range": list[float],
    "data.train.crop": int | list[int],
    "data.train.num_images": int,
    "data.test.annotations": str | None,
    "data.test.images": str | None,
    "data.test.labels": str | None,
    "data.test.scales": list[list[int]],
    "data.test.short_side": int,
    "data.test.share": float,
    "data.classes": str | int | list[str],
    "data.reduce_zero_label": bool | None,
    "data.num_classes": int,
    "data.names_from": str | None,
    "data.image_size": int,
}
_YES_NO = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a group of settings",
    NoneType: "null",
}


def register() -> None:
    """Makes `${piip.checked:VALUE}` known to OmegaConf: VALUE, after a check of the whole configuration.

    Our data loaders say it for Detectron2's own script, which checks nothing but looks at every value before it starts.
    `${piip.checked:VALUE,training}` also names settings without effect in that script.
    """
    OmegaConf.register_new_resolver(_RESOLVER, _checked, replace=True)


def unregister() -> None:
    """Makes it VALUE alone: the check has been done."""
    OmegaConf.register_new_resolver(_RESOLVER, lambda value, *_: value, replace=True)


def _checked(value: Any, training: str = "", *, _root_: DictConfig) -> Any:
    unregister()  # the check comes across itself
    try:
        check_settings(_root_)
    finally:
        register()
    unused = _without_effect(_root_.get("train", {})) if training else []
    if unused:
        _warn_once(
            "Settings without effect in Detectron2's own script: %s. tools/lazyconfig_train_net.py of this project "
            "follows them",
            ", ".join(unused),
        )
    return value


def _without_effect(train: DictConfig) -> list[str]:
    select = OmegaConf.select
    enabled = {
        "amp.precision": select(train, "amp.enabled") and " (mixed precision is float16 there)",
        "clip_norm": select(train, "clip_norm") and "",
        "ema.decay": None if select(train, "ema.decay") is None else "",
        "deepspeed.stage": select(train, "deepspeed.stage") and "",
        "seed": select(train, "seed", default=-1) >= 0 and " (a resumed run does not go on with its order)",
    }
    return [f"train.{key}={select(train, key)}{note}" for key, note in enabled.items() if isinstance(note, str)]


def check_settings(cfg: DictConfig) -> None:
    """Checks the types of a finished configuration: of `train`, of `data`, and of the arguments of our own classes.

    Raises:
        ConfigError: If one has another type; the message names it.
    """
    pending: list[tuple[str, Any]] = [("", cfg)]
    while pending:
        prefix, node = pending.pop()
        for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
            path = f"{prefix}{key}"
            try:
                value = node[key]
            except (MissingMandatoryValue, InterpolationResolutionError):  # OmegaConf's own, where it is used
                continue
            if value is not None or path in _SETTINGS:  # what is null elsewhere is often not built at all
                fit(value, _declared(cfg, path, ours=True), path, lenient=False)
            if OmegaConf.is_config(value):
                pending.append((f"{path}.", value))


def expected_type(cfg: DictConfig, key: str) -> Any:
    """The type of a setting such as "train.max_iter": as declared, otherwise that of its present value, or Any."""
    value, hint = OmegaConf.select(cfg, key), _declared(cfg, key)
    if value is None:
        return hint
    if hint is not Any:
        with contextlib.suppress(ConfigError):
            fit(value, hint, key, lenient=False)
            return hint
    parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else None
    called = isinstance(parent, DictConfig) and "_target_" in parent
    return float if type(value) is int and called else _type_of(value)  # arguments without a type: any number


def _declared(cfg: DictConfig, key: str, *, ours: bool = False) -> Any:
    """The type of a setting in the table, or of an argument of a LazyCall's target; Any for objects."""
    if key in _SETTINGS:
        return _SETTINGS[key]
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return Any
    target = target_of(node)
    if ours and getattr(target, "__module__", "").split(".")[0] not in ("piip", "piip_core"):
        return Any
    hint = arguments(target).get(name, Any)
    return hint if any(_plain(kind) and kind is not NoneType for kind in _options(hint)) else Any


def target_of(node: DictConfig) -> Any:
    """What a LazyCall calls.

    Raises:
        ConfigError: If there is no such thing.
    """
    try:
        return locate(node._target_) if isinstance(node._target_, str) else node._target_
    except ImportError as error:
        raise ConfigError(f"_target_={node._target_}: {str(error).splitlines()[0]}") from error


def arguments(target: Any) -> dict[str, Any]:
    """Names and types of the arguments that a LazyCall's target takes."""
    found: dict[str, Any] = {}
    # a class that takes anything else hands it on to the next one
    for taker in target.__mro__ if inspect.isclass(target) else (target,):
        try:
            parameters = inspect.signature(taker, eval_str=True).parameters.values()
        except NameError:  # an annotation of what is imported for type checkers only
            parameters = inspect.signature(taker).parameters.values()
        for parameter in parameters:
            hint, default = parameter.annotation, parameter.default
            if hint is parameter.empty or isinstance(hint, str):
                hint = bool if isinstance(default, bool) else Any
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(parameter.name, hint | None if default is None and hint is not Any else hint)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def _type_of(value: Any) -> Any:
    if isinstance(value, DictConfig):
        return dict | None if "_target_" in value else dict
    if isinstance(value, ListConfig):
        kinds = {_type_of(v) for v in value}
        kinds = {float} if kinds == {int, float} else kinds
        return list[kinds.pop()] if len(kinds) == 1 else list
    if isinstance(value, str):
        return str | None
    return type(value) if isinstance(value, bool | int | float) else Any


def fit(value: Any, hint: Any, key: str, *, text: str | None = None, lenient: bool = True) -> Any:
    """A value in the type that a setting has: "no" as False, 1e3 as 1000, 2024_01 as text where those are expected.

    Args:
        value: As parsed, or read from a configuration.
        hint: Its type, from `expected_type`.
        key: Name of the setting, for the message.
        text: What was written, if known: it is the value where text is expected.
        lenient: Whether other ways of writing a value of the type are taken, too.

    Raises:
        ConfigError: If it cannot be meant.
    """
    number, options = type(value) in (bool, int, float), _options(hint)
    if number or isinstance(value, str):  # no object of a class
        options = tuple(kind for kind in options if _plain(kind)) or options
    if number and str in options and text is not None and str(value) != text:
        return text  # 2024_01 for text or a number: nobody writes numbers like that
    for convert in (_strictly, _leniently) if lenient else (_strictly,):
        for kind in options:
            with contextlib.suppress(ValueError):
                return convert(value, kind, text)
    quote = f" (text that looks like a number is quoted twice: '{key}=\"...\"')" if number and str in options else ""
    written = text if text is not None else "null" if value is None else value
    raise ConfigError(f"{key}={written}: expected {_words(options)}{quote}")


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _plain(kind: Any) -> Any:
    """What a command line can write: bool, int, float, str, list, dict or NoneType; None for objects of classes."""
    origin = get_origin(kind) or kind
    plain = list if origin in (tuple, Sequence) else origin
    return plain if plain in _WORDS else None


def _strictly(value: Any, kind: Any, text: str | None, lenient: bool = False) -> Any:
    """The value, if it has the type or nobody can tell; otherwise ValueError."""
    plain = _plain(kind)
    if plain is list and isinstance(value, list | tuple | ListConfig):
        return _elements(value, kind, lenient)
    if plain is None or (isinstance(value, DictConfig) and "_target_" in value):
        return value
    if (plain is dict and isinstance(value, dict | DictConfig)) or (kind is float and type(value) is int):
        return value
    if type(value) is kind and value == value:  # nan is no number
        return value
    raise ValueError


def _leniently(value: Any, kind: Any, text: str | None) -> Any:
    """Like `_strictly`, and from other ways of writing a value."""
    if kind is bool and str(value).lower() in _YES_NO:
        return _YES_NO[str(value).lower()]
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is str and text is not None and isinstance(value, bool | int | float):
        return text
    return _strictly(value, kind, text, lenient=True)


def _elements(values: Sequence[Any], kind: Any, lenient: bool) -> list[Any]:
    kinds = [k for k in get_args(kind) if k is not ...] or [Any]
    if len(kinds) == 1:
        kinds *= len(values)
    return [fit(value, k, "", lenient=lenient) for value, k in zip(values, kinds, strict=True)]


def _words(kinds: Sequence[Any]) -> str:
    words = []
    for kind in kinds:
        inner = [_words(_options(k)) for k in get_args(kind) if k is not ...]
        listed = f"a list of [{', '.join(dict.fromkeys(inner))}]" if _plain(kind) is list and inner else None
        words.append(listed or _WORDS.get(kind) or getattr(kind, "__name__", str(kind)))
    return " or ".join(words)
