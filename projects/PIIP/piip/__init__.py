"""PIIP for Detectron2: backbone, published training settings, data, training and prediction."""

import importlib.util

if importlib.util.find_spec("detectron2") is not None:  # the demo trains a classifier without it
    # saved configurations use their resolvers, and import anything of ours before
    from . import setting_types as setting_types
    from . import solver as solver
