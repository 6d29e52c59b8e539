"""PIIP for Detectron2: backbone, published training settings, data, training and prediction."""

from . import epochs, setting_types

# Saved configurations use them, and importing anything of ours comes before
epochs.register()
setting_types.register()
