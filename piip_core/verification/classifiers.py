"""Cases of classifiers: class scores, features after every interaction."""

from __future__ import annotations

from ..checkpoints import classifier_from_public, from_published
from ..classifier import PIIPClassifier
from .backbones import check_intermediates
from .check import Check
from .golden import GoldenCase

__all__ = ["verify_classifier"]


def verify_classifier(case: GoldenCase) -> Check:
    """Builds the model through the public configuration names and the checkpoint conversion, and runs it."""
    check = Check(case)
    state = case.below("state.")
    published = classifier_from_public(case.config, {name: tensor.shape for name, tensor in state.items()})
    model = PIIPClassifier(published.config).eval()
    converted, report = from_published(state, published.config, source=case.name)
    model.load_state_dict(report.check() and converted)

    image = case.below("input.")["image"]
    check.close("output", model(image))
    check_intermediates(check, model.pyramid, image)
    return check
