"""Cases of single modules: the deformable attention operator and one interaction unit."""

from __future__ import annotations

from piip_core.checkpoints.names import unit_rules
from piip_core.checkpoints.rules import RuleTable
from piip_core.config import InteractionConfig, UnitSpec
from piip_core.errors import NotSupportedYet
from piip_core.interaction import InteractionUnit
from piip_core.ops import MSDeformAttn, make_reference_points

from .check import Check
from .golden import GoldenCase
from .losses import backpropagate, check_gradients


def verify_op(case: GoldenCase) -> Check:
    """Deformable attention with and without a padding mask: output and all gradients."""
    config, check = case.config, Check(case)
    state, inputs = case.below("state."), case.below("input.")
    module = MSDeformAttn(
        config["d_model"],
        config["n_heads"],
        config["n_levels"],
        config["n_points"],
        value_ratio=config.get("ratio", 1.0),
        value_dim=config.get("d_feat"),
    ).to(inputs["query"].dtype)
    module.load_state_dict(state)
    shapes = [tuple(shape) for shape in inputs["spatial_shapes"].tolist()]
    masks = {"nomask": None} | {name.removeprefix("padding_"): x for name, x in inputs.items() if "padding_" in name}
    for variant, mask in masks.items():
        if f"output.{variant}" not in case.results:
            continue
        query, feat = (inputs[name].clone().requires_grad_() for name in ("query", "feat"))
        module.zero_grad()
        out = module(query, inputs["reference_points"], feat, shapes, mask)
        check.close(f"output.{variant}", out)
        if backpropagate(check, [out], f"grad.{variant}."):
            differentiated = {"query": query, "feat": feat, **dict(module.named_parameters())}
            check_gradients(check, {name: x.grad for name, x in differentiated.items()}, f"grad.{variant}.")
    return check


def verify_interaction(case: GoldenCase) -> Check:
    """One unit between two branches: both outputs and all gradients."""
    config, check = case.config, Check(case)
    kinds, norms = {"deform": "deformable", "normal": "regular"}, {"ln": "layernorm", "none": "none"}
    if config["attn_type"] not in kinds or config["norm"] not in norms:
        raise NotSupportedYet(f"attn_type={config['attn_type']!r} with norm={config['norm']!r}")
    state = case.below("state.")
    unit = InteractionUnit(
        (config["branch1_dim"], config["branch2_dim"]),
        UnitSpec(1, 2),
        InteractionConfig(
            attention=kinds[config["attn_type"]],
            num_heads=config["num_heads"],
            num_points=config["n_points"],
            value_ratio=config["deform_ratio"],
            projection=config["with_proj"],
            norm=norms[config["norm"]],
            ffn=config.get("with_cffn", "branch2to1_injector.cffn_gamma" in state),
            ffn_ratio=config["cffn_ratio"],
        ),
    ).eval()
    table = RuleTable(unit_rules())
    unit.load_state_dict({_ours(table, name): tensor for name, tensor in state.items()})

    inputs = {name: tensor.requires_grad_() for name, tensor in case.below("input.").items()}
    unit.to(inputs["x1"].dtype)
    grids = {"x1": config["hw1"], "x2": config["hw2"]}
    low, high = unit(*(inputs[name].unflatten(1, tuple(grid)) for name, grid in grids.items()))
    outputs = {"x1": low.flatten(1, 2), "x2": high.flatten(1, 2)}
    for name, out in outputs.items():
        check.close(f"output.{name}", out)
    if backpropagate(check, list(outputs.values())):
        differentiated = inputs | {table.to_published(name)[0][0]: p for name, p in unit.named_parameters()}
        check_gradients(check, {name: x.grad for name, x in differentiated.items()})
    for direction, grid in (("2to1", config["hw1"]), ("1to2", config["hw2"])):
        if f"aux.{direction}.reference_points" in case.tensors:
            points = make_reference_points(*grid)
            check.close(f"aux.{direction}.reference_points", points.reshape(1, -1, 1, 2))
    return check


def _ours(table: RuleTable, published: str) -> str:
    found = table.to_ours(published)
    if found is None:
        raise NotSupportedYet(f"parameter {published}")
    return found[0]
