"""Cases of pretrained weights: what a loader makes of a file, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from piip_core.branches import ViTConfig, build_branch
from piip_core.checkpoints import convert_pretrained
from piip_core.checkpoints.branch_names import BRANCH_CLASSES, branch_class_of
from piip_core.checkpoints.rules import PARTS, RuleTable
from piip_core.config import BranchConfig
from piip_core.errors import NotSupportedYet

from .check import Check
from .golden import GoldenCase
from .public_config import num_blocks


def verify_loading(case: GoldenCase) -> Check:
    """Loads the file of the case into a branch of the recorded sizes, and compares all recorded parameters."""
    check = Check(case)
    expected, given = case.below("output."), case.below("input.")
    branch_class = branch_class_of(list(expected))
    table = RuleTable(BRANCH_CLASSES[branch_class])
    if branch_class in ("deit", "internvit"):
        network = _network(expected, case.info.get("config", {}), class_slot=branch_class == "internvit")
        model = build_branch(BranchConfig(network=network, image_size=network.pos_grid * network.patch_size)).model
        state = model.state_dict()
    else:  # names and shapes of what is recorded are enough where the file has to give all of it
        state = _empty(expected, table)
    converted, report = convert_pretrained(given, state, source=case.name)
    state |= report.check() and converted
    for name, tensor in state.items():
        for key, rule in table.to_published(name):
            part = tensor if rule.part is None else tensor.chunk(PARTS)[rule.part]
            check.close(f"output.{key}", part, rule.change.to_ours(expected[key]), rule.change.note)
    return check


def _empty(expected: Mapping[str, Tensor], table: RuleTable) -> dict[str, Tensor]:
    """Our names of published tensors, with tensors of their shapes."""
    found = {name: (table.to_ours(name), tensor) for name, tensor in expected.items()}
    if unknown := [name for name, (ours, _) in found.items() if ours is None]:
        raise NotSupportedYet(f"parameter {unknown[0]}")
    shapes = {ours: rule.change.to_ours(tensor).shape for (ours, rule), tensor in found.values()}
    parts = {ours: PARTS for (ours, rule), _ in found.values() if rule.part is not None}
    return {name: torch.empty(shape[0] * parts.get(name, 1), *shape[1:]) for name, shape in shapes.items()}


def _network(expected: Mapping[str, Tensor], settings: Mapping[str, Any], *, class_slot: bool) -> ViTConfig:
    """Sizes of the recorded network; attention heads do not show in the shapes, and do not matter for loading."""
    scales = [tensor for name, tensor in expected.items() if name.split(".")[-1].startswith("gamma")]
    # A layer scale that the file has not keeps the constant it starts from, which not every case names
    recorded = scales[0].flatten()[0].item() if scales else None
    initial = settings.get("init_scale", settings.get("init_values", recorded))
    kernel, hidden = expected["patch_embed.proj.weight"], expected["blocks.0.mlp.fc1.weight"]
    return ViTConfig(
        embed_dim=kernel.shape[0],
        depth=num_blocks(expected),
        num_heads=1,
        mlp_ratio=hidden.shape[0] / hidden.shape[1],
        patch_size=kernel.shape[-1],
        qkv_bias="blocks.0.attn.qkv.bias" in expected,
        layer_scale=initial if scales else None,
        pos_grid=round((expected["pos_embed"].shape[1] - class_slot) ** 0.5),
        norm="layernorm" if "blocks.0.norm1.bias" in expected else "rmsnorm",
        qk_norm="blocks.0.attn.q_norm.weight" in expected,
    )
