"""Adapters for other projects' programs; each needs the program that it serves. `answering` is what they share."""

from __future__ import annotations

from typing import Any

__all__ = ["lmms_eval_models"]


def lmms_eval_models() -> list[Any]:
    """What the entry point `lmms_eval.models` offers to lmms-eval: the models `piip_llava` and `piip_llava_chat`.

    Apart from the classes, because lmms-eval asks for it while it is being imported itself. Two names, because under
    one lmms-eval takes the class for messages, with which tasks with given choices stop.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest("piip_llava", simple_class_path=f"{__name__}.lmms_eval.PIIPLlava"),
        ModelManifest("piip_llava_chat", chat_class_path=f"{__name__}.lmms_eval.PIIPLlavaChat"),
    ]
