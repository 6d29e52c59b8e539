"""Parameter groups against the published ones, parameter by parameter."""

import csv
import gzip
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import instantiate

from piip.lazy import lazy_dataclass
from piip.lazy_config import load_config
from piip.solver import layer_decay_params
from piip_core import zoo
from piip_core.checkpoints import published_names
from piip_core.meta import on_meta

ROOT = Path(__file__).parents[3]
TABLES = ROOT / "tests" / "data" / "param_groups"
ROWS = sorted(path.name.removesuffix(".tsv.gz") for path in TABLES.iterdir())


def published_table(row):
    """Published name -> (learning-rate scale, weight decay)."""
    with gzip.open(TABLES / f"{row}.tsv.gz", "rt") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return {r["param"]: (float(r["lr_scale"]), float(r["weight_decay"])) for r in rows}


@pytest.mark.parametrize("row", ROWS)
def test_groups_equal_the_published_ones(row):
    cfg = load_config(str(ROOT / "projects/PIIP/configs" / zoo.get(row).config_file))
    if len(zoo.get(row).config.branches) == 4:  # the published table is of the network as the public code builds it
        cfg.model.backbone.bottom_up.config = lazy_dataclass(zoo.tsbl_as_released(zoo.get(row).config))
    cfg.train.load_pretrained = False
    with on_meta():
        cfg.optimizer.params.model = model = instantiate(cfg.model)
        optimizer = instantiate(cfg.optimizer)
    expected = published_table(row)
    backbone = cfg.model.backbone.get("bottom_up", cfg.model.backbone)
    names = published_names(instantiate(backbone.config), list(expected))
    expected = {name: value for name, value in expected.items() if name not in names.unused_tensors()}
    names = names.table()
    ours = {parameter: [key for key, _ in names.to_published(name)] for name, parameter in model.named_parameters()}
    base = cfg.optimizer.lr
    actual = {
        name: (group["lr"] / base, group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
        for name in ours[p]
    }
    covered = {name: actual[name] for name in expected if name in actual}
    assert covered.keys() == expected.keys()
    for name, (scale, decay) in expected.items():
        assert covered[name] == (pytest.approx(scale, rel=1e-6), decay), name


def test_frozen_parameters_and_models_without_pyramid():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    model[0].bias.requires_grad = False
    groups = layer_decay_params(model, base_lr=0.1, weight_decay=0.05, decay_rate=0.5)
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [(0.1, 0.0, 2), (0.1, 0.05, 1)]
