"""Cases of classifiers: class scores, features after every interaction."""

from __future__ import annotations

from piip_core.checkpoints import from_published, published_names, to_published
from piip_core.classifier import PIIPClassifier

from .backbones import check_intermediates
from .check import Check
from .golden import GoldenCase
from .losses import backpropagate, check_gradients
from .public_config import classifier_from_public

__all__ = ["verify_classifier"]


def verify_classifier(case: GoldenCase) -> Check:
    """Builds the model through the public configuration names and the checkpoint conversion, and runs it."""
    check = Check(case)
    state = case.below("state.")
    config = classifier_from_public(case.config, {name: tensor.shape for name, tensor in state.items()})
    model = PIIPClassifier(config).eval()
    converted, report = from_published(state, config, source=case.name)
    model.load_state_dict(report.check() and converted)

    image = case.below("input.")["image"].requires_grad_()
    output = model(image)
    check.close("output", output)
    check_intermediates(check, model.pyramid, image)
    if backpropagate(check, [output]):
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        published = to_published(gradients, published_names(config, state))[0]
        check_gradients(check, {"input": image.grad} | published)
    return check
