"""Cases of multimodal vision encoders: branch features, visual tokens, gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..checkpoints import config_from_public, from_published, to_published
from ..checkpoints.names import PublishedNames, projector_rules
from ..checkpoints.public_config import PublishedModel
from ..checkpoints.rules import RuleTable
from ..errors import NotSupportedYet
from ..merging import TokenMerging
from ..pyramid import PIIP
from .check import Check
from .golden import GoldenCase
from .losses import backpropagate, check_gradients

__all__ = ["published_tower", "token_merging_options", "verify_multimodal"]

TOWER, PROJECTOR = "vision_tower.vision_tower.", "mm_projector."
_NORMS = {"gn": "group", "ln": "layer"}


def published_tower(case: GoldenCase, config: dict[str, Any], state: dict[str, Tensor]) -> PublishedModel:
    """Our configuration of a recorded vision tower; `state` is what lies below it in the file."""
    known = case.info.get("clip_configs", {})
    public = {
        key: value | {"clip_config": known[value["pretrained"]]}
        if isinstance(value, dict) and value.get("pretrained") in known
        else value
        for key, value in config.items()
    }
    return config_from_public(public, {name: tensor.shape for name, tensor in state.items()}, merging=False)


def token_merging_options(projector: dict[str, Any]) -> dict[str, Any]:
    """Options of `TokenMerging` from the public fields of a projector.

    Raises:
        NotSupportedYet: For a norm that is not known here.
    """
    norm = projector.get("norm", "gn")
    if norm not in _NORMS:
        raise NotSupportedYet(f"projector norm {norm!r}")
    return {"norm": _NORMS[norm], "grid": projector.get("out_shape")}


def verify_multimodal(case: GoldenCase) -> Check:
    """Builds encoder and projector through the checkpoint conversion, and runs them."""
    check = Check(case)
    state = case.below("state.")
    tower = {name.removeprefix(TOWER): tensor for name, tensor in state.items() if name.startswith(TOWER)}
    published = published_tower(case, case.config, tower)
    names = PublishedNames(published.config, published.branch_classes, scale="weight")
    model = nn.ModuleDict({"pyramid": PIIP(published.config)}).eval()
    converted, report = from_published(tower, published.config, names=names, source=case.name)
    model.load_state_dict(report.check() and converted)

    dims = model["pyramid"].dims
    options = token_merging_options(case.info["projector"])
    merging = TokenMerging(dims, case.info["llm_hidden_size"], **options)
    table = RuleTable(rule.prefixed("", PROJECTOR) for rule in projector_rules(len(dims), options["norm"]))
    found = {name: table.to_ours(name) for name in state if name.startswith(PROJECTOR)}
    merging.load_state_dict({ours[0]: state[name] for name, ours in found.items()})

    image = case.below("input.")["image"].requires_grad_()
    features = model["pyramid"](image)
    tokens = merging(features)
    for i, feature in enumerate(features):
        check.close(f"output.features.{i}", feature)
    check.close("output.tokens", tokens)
    if backpropagate(check, [*features, tokens]):
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        ours = {TOWER + key: grad for key, grad in to_published(gradients, names)[0].items()} | {"input": image.grad}
        check_gradients(check, ours | {table.to_published(name)[0]: p.grad for name, p in merging.named_parameters()})
    return check
