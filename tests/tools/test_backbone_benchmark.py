"""The benchmark of backbones, on small ones: what it compares is the same, and its numbers add up."""

import pytest
import torch

pytest.importorskip("detectron2")

from piip_core import DensePIIP, zoo
from piip_core.interaction import DeformableCrossAttention
from piip_tools.benchmarks.backbones import (
    TimedModel,
    measure_backbones,
    piip_models,
    scatter_offsets,
)


def test_scattered_offsets_spread_over_two_pixels(tiny_config):
    model = scatter_offsets(DensePIIP(tiny_config()))
    for module in model.modules():
        if isinstance(module, DeformableCrossAttention):
            offsets = module.sampling_offsets(torch.randn(1000, module.sampling_offsets.in_features))
            assert 1.5 < (offsets - module.sampling_offsets.bias).std() < 2.5


@pytest.fixture
def models(tiny_config):
    """Two models, the second with 36 times the pixels of the first."""

    def build():
        return DensePIIP(tiny_config())

    return [
        TimedModel(name="small", form="ours", build=build, image_size=64),
        TimedModel(name="large", form="baseline", build=build, image_size=384),
    ]


def test_inference(models):
    rows = measure_backbones(models, ["fp32", "amp", "bf16"], repeats=2)
    assert [row["what"] for row in rows] == [
        f"small at 64, {precision}{kind}" for precision in ("fp32", "amp", "bf16") for kind in ("", ", peak memory")
    ]
    for row in rows:
        assert row["ratios"]["baseline"] == 1 and min(row["medians"].values()) > 0
        assert row["ratios"]["ours"] < (0.2 if row["unit"] == "MB" else 1)  # 36 times fewer pixels
    outputs = 32 * 384**2 * (1 / 4**2 + 1 / 8**2 + 1 / 16**2 + 1 / 32**2)
    full, half = (1e6 * rows[index]["medians"]["baseline"] for index in (1, 5))
    assert full > 4 * outputs and half < 0.6 * full  # bytes per number: 4 and 2


def test_training(models):
    step, forward = (measure_backbones(models, ["fp32"], training=training, repeats=1) for training in (True, False))
    for name in ("ours", "baseline"):
        assert step[0]["medians"][name] > forward[0]["medians"][name]
        assert step[1]["medians"][name] > 2 * forward[1]["medians"][name]


def test_forms_of_published_models(tiny_config, monkeypatch):
    entry = zoo.ZooEntry(name="tiny", config=tiny_config(), pad_divisor=32)
    monkeypatch.setattr(zoo, "get", lambda name: entry)
    ours, prepared = piip_models(["tiny"], ["ours", "prepared"], scale=0.6)
    assert (ours.name, ours.form, ours.image_size) == ("tiny", "ours", 64)
    assert prepared.load("fp32", "cpu", 1)[0].pyramid.inference_only
    (neck,) = piip_models(["tiny"], ["ours"], neck=True)
    model, image = neck.load("fp32", "cpu", 1)
    assert {level.shape[1] for level in model(image).values()} == {256}
