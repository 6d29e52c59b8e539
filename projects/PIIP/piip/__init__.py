"""PIIP for Detectron2: backbone, published training settings, data, training and prediction."""

import importlib.util

if importlib.util.find_spec("detectron2") is not None:  # the demo trains a classifier without it
    from . import epochs, setting_types

    # Saved configurations use them, and importing anything of ours comes before
    epochs.register()
    setting_types.register()
