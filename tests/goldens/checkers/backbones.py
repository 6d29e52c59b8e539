"""Cases of whole backbones: outputs, features after every interaction, gradients."""

from __future__ import annotations

from torch import Tensor

from piip_core.checkpoints import from_published, published_names, to_published
from piip_core.pyramid import PIIP, DensePIIP

from .check import Check
from .golden import GoldenCase
from .losses import backpropagate, check_gradients
from .public_config import backbone_from_public

__all__ = ["check_intermediates", "verify_detection_backbone"]


def verify_detection_backbone(case: GoldenCase) -> Check:
    """Builds the model through the public configuration names and the checkpoint conversion, and runs it."""
    check = Check(case)
    state = case.below("state.")
    config = backbone_from_public(
        case.config,
        {name: tensor.shape for name, tensor in state.items()},
        branch4_built_from=case.info.get("branch4_built_from"),
    )
    model = DensePIIP(config).eval()
    converted, report = from_published(state, config, source=case.name)
    model.load_state_dict(report.check() and converted)

    image = case.below("input.")["image"].requires_grad_()
    outputs = model(image)
    for index, output in enumerate(outputs):
        check.close(f"output.{index}", output)
    check_intermediates(check, model.pyramid, image)
    if backpropagate(check, outputs):
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        # Gradients have the shapes of their parameters, so the conversion to published names applies to them too
        published = to_published(gradients, published_names(config, state))[0]
        check_gradients(check, {"input": image.grad} | published)
    return check


def check_intermediates(check: Check, pyramid: PIIP, image: Tensor) -> None:
    """Compares the recorded maps after the interactions."""
    recorded = [name.split(".")[1:] for name in check.case.results if name.startswith("inter.")]
    if not recorded:
        return
    maps = pyramid.forward_intermediates(image, {int(k) for k, _ in recorded})[1]
    for k, branch in recorded:
        feature_map = maps[int(k)][int(branch.removeprefix("x")) - 1]
        check.close(f"inter.{k}.{branch}", feature_map.flatten(2).transpose(1, 2))
