"""Making modules under DeepSpeed's ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

__all__ = ["make_whole"]

Module = TypeVar("Module", bound=nn.Module)


def make_whole(make: Callable[[], Module]) -> Module:
    """Makes a module whose construction writes into its own parameters.

    While transformers loads a model under ZeRO-3, every parameter is cut up and handed out to the processes as soon as
    the layer that owns it is made; whoever starts its weights later finds nothing there. What is made here is
    cut up when it is ready.

    Whether a model is being loaded, and how to stop the cutting meanwhile, only a module inside DeepSpeed says. Seen
    working with DeepSpeed 0.19.8.

    Args:
        make: Makes the module.
    """
    if not is_deepspeed_zero3_enabled():
        return make()
    import deepspeed
    from deepspeed.runtime.zero import partition_parameters as zero

    if zero.top_level_context is None:  # not while a model is loaded: stays whole
        return make()
    zero.shutdown_init_context()
    try:
        module = make()
    finally:
        zero.restore_init_context()
    deepspeed.zero.Init(module=module, config_dict_or_path=deepspeed_config())
    return module
