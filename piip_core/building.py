"""The module that a configuration describes."""

from __future__ import annotations

from .classifier import PIIPClassifier
from .classifier_config import ClassifierConfig
from .config import PIIPConfig
from .pyramid import PIIP, DensePIIP

__all__ = ["build_model"]


def build_model(config: PIIPConfig | ClassifierConfig) -> PIIP | DensePIIP | PIIPClassifier:
    """A classifier, a dense backbone, or without `merging` the pyramid alone; weights are random."""
    if isinstance(config, ClassifierConfig):
        return PIIPClassifier(config)
    return PIIP(config) if config.merging is None else DensePIIP(config)
