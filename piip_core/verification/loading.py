"""Cases of pretrained weights: what a loader makes of a file, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..branches import build_branch
from ..checkpoints import convert_pretrained
from ..checkpoints.branch_names import BRANCH_CLASSES, branch_class_of
from ..checkpoints.public_branches import num_blocks
from ..checkpoints.rules import Change, RuleTable
from ..config import BranchConfig
from ..networks import ViTConfig
from .check import Check
from .golden import GoldenCase

__all__ = ["verify_loading"]


def verify_loading(case: GoldenCase) -> Check:
    """Loads the file of the case into a branch of the recorded sizes, and compares all recorded parameters."""
    check = Check(case)
    expected, given = case.below("output."), case.below("input.")
    branch_class = branch_class_of(list(expected))
    if branch_class == "beit":
        target = {name: torch.empty_like(tensor) for name, tensor in expected.items()}  # tables alone are recorded
        state, report = convert_pretrained(given, target, source=case.name)
        state = report.check() and state
    else:
        network = _network(expected, case.info.get("config", {}), class_slot=branch_class == "internvit")
        model = build_branch(BranchConfig(network=network, image_size=network.pos_grid * network.patch_size)).model
        converted, report = convert_pretrained(given, model.state_dict(), source=case.name)
        model.load_state_dict(report.check() and converted, strict=False)
        state = model.state_dict()

    table = RuleTable(BRANCH_CLASSES[branch_class])
    for name, tensor in state.items():
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
        depth=num_blocks(expected),
        num_heads=1,
        mlp_ratio=hidden.shape[0] / hidden.shape[1],
        patch_size=kernel.shape[-1],
        qkv_bias="blocks.0.attn.qkv.bias" in expected,
        layer_scale=initial if scaled else None,
        pos_grid=round((expected["pos_embed"].shape[1] - class_slot) ** 0.5),
        norm="layernorm" if "blocks.0.norm1.bias" in expected else "rmsnorm",
        qk_norm="blocks.0.attn.q_norm.weight" in expected,
    )
