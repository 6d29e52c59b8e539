"""PIIP for Detectron2: backbone, published training settings, data, training and prediction."""

from . import epochs

epochs.register()  # saved configurations use it, and importing anything of ours comes before
