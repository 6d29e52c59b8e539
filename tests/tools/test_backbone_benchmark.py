"""The benchmark of backbones, on small ones: what it compares is the same, and its numbers add up."""

from contextlib import contextmanager

import pytest
import torch

from piip_core import DensePIIP
from piip_core.interaction import DeformableCrossAttention
from piip_tools.backbone_benchmark.breakdown import REST, measure_parts
from piip_tools.backbone_benchmark.breakdown import format_results as format_parts
from piip_tools.backbone_benchmark.measuring import draw_results, format_results, measure_backbones
from piip_tools.backbone_benchmark.models import TimedModel, piip_models, scatter_offsets
from piip_tools.backbone_benchmark.plain import plain_formulation


def test_plain_formulation_computes_the_same(tiny_model):
    image = torch.randn(1, 3, 100, 171)
    expected = tiny_model(image)
    with plain_formulation(tiny_model):
        plain = tiny_model(image)
    after = tiny_model(image)
    for e, p, a in zip(expected, plain, after, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-4, atol=1e-4)
        assert torch.equal(a, e)


def test_plain_formulation_samples_with_pytorch(tiny_model):
    def names():
        with torch.profiler.profile() as recorded:
            tiny_model(torch.randn(1, 3, 64, 64))
        return {event.key for event in recorded.key_averages()}

    with plain_formulation(tiny_model):
        plain = names()
    assert "aten::grid_sampler" in plain and "piip::deform_attn_grid" not in plain
    assert "piip::deform_attn_grid" in names()


def test_scattered_offsets_spread_over_two_pixels(tiny_config):
    model = scatter_offsets(DensePIIP(tiny_config()))
    for module in model.modules():
        if isinstance(module, DeformableCrossAttention):
            offsets = module.sampling_offsets(torch.randn(1000, module.sampling_offsets.in_features))
            assert 1.5 < (offsets - module.sampling_offsets.bias).std() < 2.5


@pytest.fixture
def models(tiny_config):
    """Two models, the second with 36 times the pixels of the first, and in a context that counts its uses."""
    entered = []

    @contextmanager
    def context(model):
        entered.append(model)
        yield

    def build():
        return DensePIIP(tiny_config())

    return [
        TimedModel(name="small", build=build, image_size=64),
        TimedModel(name="large", build=build, image_size=384, context=context),
    ], entered


def test_inference(models):
    models, entered = models
    found = measure_backbones(models, ["fp32", "amp", "bf16"], repeats=2)
    assert [(result["model"], result["precision"]) for result in found] == [
        (name, precision) for precision in ("fp32", "amp", "bf16") for name in ("small", "large")
    ]
    for small, large in zip(found[::2], found[1::2], strict=True):
        assert len(small["seconds"]) == len(large["seconds"]) == 2 and min(small["seconds"] + large["seconds"]) > 0
        assert large["ratio"] == large["peak_ratio"] == 1 and small["peak_ratio"] == small["peak"] / large["peak"]
        assert small["ratio"] < 1 and small["peak_ratio"] < 0.2  # 36 times fewer pixels
    outputs = 32 * 384**2 * (1 / 4**2 + 1 / 8**2 + 1 / 16**2 + 1 / 32**2)
    assert found[1]["peak"] > 4 * outputs and found[-1]["peak"] < 0.6 * found[1]["peak"]  # bytes per number: 4 and 2
    assert len(entered) == 3 * 4  # one pass that does not count, two rounds, one for memory


def test_training(models):
    models, _ = models
    found = measure_backbones(models, ["fp32"], training=True, repeats=1)
    inference = measure_backbones(models, ["fp32"], repeats=1)
    for step, forward in zip(found, inference, strict=True):
        assert step["peak"] > 2 * forward["peak"] and step["median"] > forward["median"]


def test_parts_add_up(models):
    models, _ = models
    (result,) = measure_parts(models[1:], ["fp32"], repeats=1)
    assert set(result["seconds"]) == {
        "self-attention",
        "MLPs",
        "deformable attention",
        "interactions: norms, projections, FFNs",
        "merging",
        "feature pyramid",
        REST,
    }
    assert min(result["seconds"].values()) > 0
    table = format_parts([result]).splitlines()
    assert f"{sum(result['seconds'].values()):.3f} (100%)" in table[-1]


def test_table_and_chart(models, tmp_path):
    found = measure_backbones(models[0], ["fp32"], repeats=1)
    lines = format_results(found).splitlines()[2:]
    assert lines[0].split()[:3] == ["small", "64", "fp32"] and " 1.00 " in lines[1]
    draw_results(found, "a title").savefig(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_forms_of_published_models():
    ours, plain, prepared = piip_models(["piip_tsb_1120_896_448"], scale=0.3)
    assert ours.image_size == 320 and ours.name == "piip_tsb_1120_896_448 (ours)"
    assert plain.context is plain_formulation
    assert prepared.finish(ours.build()).pyramid.inference_only
