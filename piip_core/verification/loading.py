"""Cases of pretrained weights: what a loader makes of a file, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..branches import build_branch
from ..checkpoints import convert_pretrained
from ..checkpoints.names import BRANCH_CLASSES, branch_class_of
from ..checkpoints.rules import Change, RuleTable
from ..config import BranchConfig, ViTConfig
from .check import Check
from .golden import GoldenCase

__all__ = ["verify_loading"]


def verify_loading(case: GoldenCase) -> Check:
    """Loads the file of the case into a branch of the recorded sizes, and compares all parameters."""
    check = Check(case)
    expected = case.below("output.")
    branch_class = branch_class_of(list(expected))
    settings = case.info.get("config", {})
    network = _network(expected, settings, class_slot=branch_class == "internvit")
    model = build_branch(BranchConfig(network=network, image_size=network.pos_grid * network.patch_size)).model
    state, report = convert_pretrained(case.below("input."), model.state_dict(), source=case.name)
    model.load_state_dict(report.check() and state, strict=False)

    table = RuleTable(BRANCH_CLASSES[branch_class])
    for name, tensor in model.state_dict().items():
        key, rule = table.to_published(name)
        detail = "" if rule.change is Change.NONE else rule.change.value
        check.close(f"output.{key}", tensor, rule.change.to_ours(expected[key]), detail)
    return check


def _network(expected: Mapping[str, Tensor], settings: Mapping[str, Any], *, class_slot: bool) -> ViTConfig:
    """Sizes of the recorded network; attention heads do not show in the shapes, and do not matter for loading."""
    scaled = any(name.split(".")[-1].startswith("gamma") for name in expected)
    initial = settings.get("init_scale", settings.get("init_values", 1.0))
    kernel, hidden = expected["patch_embed.proj.weight"], expected["blocks.0.mlp.fc1.weight"]
    return ViTConfig(
        embed_dim=kernel.shape[0],
        depth=len({name.split(".")[1] for name in expected if name.startswith("blocks.")}),
        num_heads=1,
        mlp_ratio=hidden.shape[0] / hidden.shape[1],
        patch_size=kernel.shape[-1],
        qkv_bias="blocks.0.attn.qkv.bias" in expected,
        layer_scale=initial if scaled else None,
        pos_grid=round((expected["pos_embed"].shape[1] - class_slot) ** 0.5),
    )
