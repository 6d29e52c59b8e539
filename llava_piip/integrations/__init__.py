"""Adapters for other projects' programs; each needs the program that it serves."""

from __future__ import annotations

from typing import Any

__all__ = ["lmms_eval_models"]


def lmms_eval_models() -> list[Any]:
    """What the entry point `lmms_eval.models` offers to lmms-eval: the model `piip_llava`.

    Apart from the class, because lmms-eval asks for it while it is being imported itself.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest("piip_llava", simple_class_path=f"{__name__}.lmms_eval.PIIPLlava")]
