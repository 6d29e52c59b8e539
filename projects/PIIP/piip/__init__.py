"""PIIP for Detectron2: backbone, published training settings, data, training and prediction."""
