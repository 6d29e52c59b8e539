"""Cases of backbones and classifiers: outputs, features after every interaction, gradients."""

from __future__ import annotations

from torch import Tensor

from piip_core.checkpoints import from_published, published_names, to_published
from piip_core.classifier import build_model
from piip_core.pyramid import PIIP

from .check import Check
from .golden import GoldenCase
from .losses import backpropagate, check_gradients
from .public_config import backbone_from_public, classifier_from_public


def verify_dense(case: GoldenCase) -> Check:
    """Builds the model through the public configuration names and the checkpoint conversion, and runs it."""
    check = Check(case)
    state = case.below("state.")
    shapes = {name: tensor.shape for name, tensor in state.items()}
    if case.family == "classification":
        config = classifier_from_public(case.config, shapes)
    else:
        built_from = case.info.get("branch4_built_from")
        config = backbone_from_public(case.config, shapes, branch4_built_from=built_from)
    model = build_model(config).eval()
    converted, report = from_published(state, config, source=case.name)
    model.load_state_dict(report.check() and converted)

    image = case.below("input.")["image"].requires_grad_()
    outputs = model(image)
    if isinstance(outputs, Tensor):
        outputs = [outputs]
        check.close("output", outputs[0])
    else:
        for index, output in enumerate(outputs):
            check.close(f"output.{index}", output)
    _check_intermediates(check, model.pyramid, image)
    if backpropagate(check, outputs):
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        # Gradients have the shapes of their parameters, so the conversion to published names applies to them too
        published = to_published(gradients, published_names(config, state))[0]
        check_gradients(check, {"input": image.grad} | published)
    return check


def _check_intermediates(check: Check, pyramid: PIIP, image: Tensor) -> None:
    """Compares the recorded maps after the interactions."""
    recorded = [name.split(".")[1:] for name in check.case.results if name.startswith("inter.")]
    if not recorded:
        return
    maps = pyramid.forward_intermediates(image, {int(k) for k, _ in recorded})[1]
    for k, branch in recorded:
        feature_map = maps[int(k)][int(branch.removeprefix("x")) - 1]
        check.close(f"inter.{k}.{branch}", feature_map.flatten(2).transpose(1, 2))
