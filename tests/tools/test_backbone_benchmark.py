"""The benchmark of backbones, on small ones: what it compares is the same, and its numbers add up."""

from contextlib import contextmanager

import pytest
import torch

from piip_core import DensePIIP
from piip_core.interaction import DeformableCrossAttention
from piip_tools.backbone_benchmark import (
    REST,
    Side,
    breakdown_table,
    draw_measurements,
    measure_inference,
    measure_parts,
    measure_training,
    measurement_table,
    piip_sides,
    plain_formulation,
)
from piip_tools.backbone_benchmark.sides import scatter


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
    model = scatter(DensePIIP(tiny_config()))
    for module in model.modules():
        if isinstance(module, DeformableCrossAttention):
            offsets = module.sampling_offsets(torch.randn(1000, module.sampling_offsets.in_features))
            assert 1.5 < (offsets - module.sampling_offsets.bias).std() < 2.5


@pytest.fixture
def sides(tiny_config):
    """Two sides, the second with 36 times the pixels of the first, and in a context that counts its uses."""
    entered = []

    @contextmanager
    def context(model):
        entered.append(model)
        yield

    def build():
        return DensePIIP(tiny_config())

    return [
        Side(name="small", form="ours", build=build, image_size=64),
        Side(name="large", build=build, image_size=384, context=context),
    ], entered


def test_inference(sides):
    sides, entered = sides
    found = measure_inference(sides, ["fp32", "amp", "bf16"], repeats=2)
    assert [(m.side, m.precision) for m in found] == [
        (side, precision) for precision in ("fp32", "amp", "bf16") for side in ("small (ours)", "large")
    ]
    for small, large in zip(found[::2], found[1::2], strict=True):
        assert len(small.seconds) == len(large.seconds) == 2 and min(small.seconds + large.seconds) > 0
        assert large.ratio == large.peak_ratio == 1 and small.peak_ratio == small.peak / large.peak
        assert small.ratio < 1 and small.peak_ratio < 0.2  # 36 times fewer pixels
    outputs = 32 * 384**2 * (1 / 4**2 + 1 / 8**2 + 1 / 16**2 + 1 / 32**2)
    assert found[1].peak > 4 * outputs and found[-1].peak < 0.6 * found[1].peak  # bytes per number: 4 and 2
    assert len(entered) == 3 * 4  # two passes before two rounds


def test_training(sides):
    sides, _ = sides
    found = measure_training(sides, ["fp32"], repeats=1)
    inference = measure_inference(sides, ["fp32"], repeats=1)
    for step, forward in zip(found, inference, strict=True):
        assert step.peak > 2 * forward.peak and step.median > forward.median


def test_parts_add_up(sides):
    sides, _ = sides
    (breakdown,) = measure_parts(sides[1:], ["fp32"], repeats=1)
    assert set(breakdown.seconds) == {
        "self-attention",
        "MLPs",
        "deformable attention",
        "interactions: norms, projections, FFNs",
        "merging",
        "feature pyramid",
        REST,
    }
    assert min(breakdown.seconds.values()) > 0
    table = breakdown_table([breakdown]).splitlines()
    assert f"{sum(breakdown.seconds.values()):.3f} (100%)" in table[-1]


def test_table_and_picture(sides, tmp_path):
    found = measure_inference(sides[0], ["fp32"], repeats=1)
    rows = measurement_table(found).splitlines()[2:]
    assert rows[0].split()[:3] == ["small", "(ours)", "64"] and " 1.00 " in rows[1]
    draw_measurements(found, "a title").savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_sides_of_published_models():
    ours, plain, prepared = piip_sides(["piip_tsb_1120_896_448"], scale=0.3)
    assert ours.image_size == 320 and ours.title == "piip_tsb_1120_896_448 (ours)"
    assert plain.context is plain_formulation
    assert prepared.finish(ours.build()).pyramid.inference_only
