"""Cases of multimodal vision encoders: branch features, visual tokens, gradients."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from piip_core.checkpoints import to_ours, to_published
from piip_core.checkpoints.branch_names import branch_classes_of
from piip_core.checkpoints.names import PublishedNames, projector_rules
from piip_core.checkpoints.public_config import config_from_public
from piip_core.checkpoints.rules import RuleTable
from piip_core.config import PIIPConfig
from piip_core.errors import NotSupportedYet
from piip_core.merging import TokenMerging
from piip_core.pyramid import PIIP

from .check import Check
from .golden import GoldenCase
from .losses import backpropagate, check_gradients

TOWER, PROJECTOR = "vision_tower.vision_tower.", "mm_projector."
_NORMS = {"gn": "group", "ln": "layer"}


def build_encoder(case: GoldenCase) -> tuple[nn.ModuleDict, TokenMerging, Callable[[], dict[str, Tensor]]]:
    """Encoder (below `pyramid`) and projector of a case, and what gives their gradients in the published names.

    Raises:
        NotSupportedYet: For a projector norm that is not known here.
    """
    state, projector = case.below("state."), case.info["projector"]
    norm = projector.get("norm", "gn")
    if norm not in _NORMS:
        raise NotSupportedYet(f"projector norm {norm!r}")
    tower = {name.removeprefix(TOWER): tensor for name, tensor in state.items() if name.startswith(TOWER)}
    config = _published_tower(case, tower)
    names = PublishedNames(config, branch_classes_of(tower, len(config.branches)), scale="weight")
    model = nn.ModuleDict({"pyramid": PIIP(config)}).eval()
    converted, report = to_ours(tower, names, source=case.name)
    model.load_state_dict(report.check() and converted)

    dims = model["pyramid"].dims
    merging = TokenMerging(dims, case.info["llm_hidden_size"], norm=_NORMS[norm], grid=projector.get("out_shape"))
    table = RuleTable(rule.prefixed("", PROJECTOR) for rule in projector_rules(len(dims), _NORMS[norm]))
    found = {name: table.to_ours(name) for name in state if name.startswith(PROJECTOR)}
    merging.load_state_dict({ours[0]: state[name] for name, ours in found.items()})

    def gradients() -> dict[str, Tensor]:
        inside = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        above = {table.to_published(name)[0][0]: p.grad for name, p in merging.named_parameters()}
        return {TOWER + key: grad for key, grad in to_published(inside, names)[0].items()} | above

    return model, merging, gradients


def _published_tower(case: GoldenCase, state: dict[str, Tensor]) -> PIIPConfig:
    """Our configuration of a recorded vision tower; `state` is what lies below it in the file."""
    known = case.info.get("clip_configs", {})
    public = {
        key: value | {"clip_config": known[value["pretrained"]]}
        if isinstance(value, dict) and value.get("pretrained") in known
        else value
        for key, value in case.config.items()
    }
    return config_from_public(public, {name: tensor.shape for name, tensor in state.items()})


def verify_multimodal(case: GoldenCase) -> Check:
    """Builds encoder and projector through the checkpoint conversion, and runs them."""
    check = Check(case)
    model, merging, gradients = build_encoder(case)
    image = case.below("input.")["image"].requires_grad_()
    features = model["pyramid"](image)
    tokens = merging(features)
    for i, feature in enumerate(features):
        check.close(f"output.features.{i}", feature)
    check.close("output.tokens", tokens)
    if backpropagate(check, [*features, tokens]):
        check_gradients(check, gradients() | {"input": image.grad})
    return check
