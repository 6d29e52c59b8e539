"""Parameter groups of what no published table holds; see test_configs.py for the published ones."""

import pytest
import torch

pytest.importorskip("detectron2")

from piip.solver import layer_decay_params


def test_frozen_parameters_and_models_without_pyramid():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    model[0].bias.requires_grad = False
    groups = layer_decay_params(model, base_lr=0.1, weight_decay=0.05, decay_rate=0.5)
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [(0.1, 0.0, 2), (0.1, 0.05, 1)]
