"""PIIP for Detectron2: backbone, published training settings, data, training and prediction."""

import importlib.util

if importlib.util.find_spec("detectron2") is not None:  # the demo trains a classifier without it
    from . import solver as solver  # saved configurations use its resolver, and import anything of ours before
