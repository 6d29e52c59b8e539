"""piip_core.ops.patch: other packages' models give the same numbers on our operator, and get theirs back."""

import sys
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from piip_core.ops import ms_deform_attn, ms_deform_attn_reference, patch

transformers = pytest.importorskip("transformers")


class Calls(TorchDispatchMode):
    """Counts the calls of our operator."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.piip.ms_deform_attn.default
        return function(*args, **(kwargs or {}))


def tiny_backbone():
    stages = dict(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage2", "stage3"])
    return transformers.ResNetConfig(**stages, layer_type="basic")


def deformable_detr():
    layers = dict(encoder_layers=1, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4, num_queries=5, d_model=32, num_feature_levels=3)
    config = transformers.DeformableDetrConfig(backbone_config=tiny_backbone(), **layers, **heads)
    return transformers.AutoModelForObjectDetection.from_config(config)


def rt_detr():
    sizes = dict(encoder_hidden_dim=16, encoder_in_channels=[8, 16], feat_strides=[8, 16], encode_proj_layers=[1])
    sizes |= dict(encoder_ffn_dim=16, encoder_attention_heads=2, d_model=16, decoder_in_channels=[16, 16])
    sizes |= dict(decoder_ffn_dim=16, num_feature_levels=2, decoder_layers=2, decoder_attention_heads=2)
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3"],
        layer_type="basic",
    )
    config = transformers.RTDetrConfig(backbone_config=backbone, num_queries=5, num_denoising=0, **sizes)
    return transformers.AutoModelForObjectDetection.from_config(config)


def run(build, randomize):
    """Outputs and gradients of a model that starts from the same random numbers, and how often ours was called."""
    torch.manual_seed(0)
    model = randomize(build()).eval().double()  # at their start, samples lie where gradients jump
    image = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    with Calls() as calls:
        output = model(image)
    (output.logits.sum() + output.pred_boxes.sum()).backward()
    return (output.logits, output.pred_boxes, *[p.grad for p in model.parameters() if p.grad is not None]), calls.count


@pytest.mark.parametrize(("build", "layers"), [(deformable_detr, 3), (rt_detr, 2)])
def test_models_of_transformers(build, layers, randomize):
    theirs, count = run(build, randomize)
    assert count == 0
    with patch("transformers"), patch("transformers"):  # the second does nothing
        ours, count = run(build, randomize)
        assert count == layers
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    assert run(build, randomize)[1] == 0


class _Function(torch.autograd.Function):
    """mmcv's, as it is documented: on GPUs, so it has nothing that runs here."""

    @staticmethod
    def forward(
        ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, im2col_step
    ):
        raise RuntimeError("not compiled")


@pytest.fixture
def mmcv(monkeypatch):
    """A stand-in for the module of mmcv, which is not installed."""
    module = ModuleType("mmcv.ops.multi_scale_deform_attn")
    module.MultiScaleDeformableAttnFunction = type("MultiScaleDeformableAttnFunction", (_Function,), {})
    module.multi_scale_deformable_attn_pytorch = lambda value, value_spatial_shapes, sampling_locations, weights: (
        ms_deform_attn_reference(value, value_spatial_shapes.flatten().tolist(), sampling_locations, weights)
    )
    for name in ("mmcv", "mmcv.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_mmcv(mmcv, make_inputs):
    inputs = make_inputs(spatial_shapes=((5, 7), (3, 2))).require_grad()
    shapes = torch.tensor(inputs.spatial_shapes)
    starts = torch.tensor([0, 35])
    function, on_cpu = mmcv.MultiScaleDeformableAttnFunction, mmcv.multi_scale_deformable_attn_pytorch

    def compute():
        return function.apply(inputs.value, shapes, starts, inputs.locations, inputs.weights, 64)

    for _ in range(2):
        with pytest.raises(RuntimeError, match="not compiled"):
            compute()
        with patch("mmcv"), Calls() as calls:
            patch("mmcv").close()  # leaves it patched
            output = compute()
            other = mmcv.multi_scale_deformable_attn_pytorch(
                inputs.value,
                value_spatial_shapes=shapes,
                sampling_locations=inputs.locations,
                attention_weights=inputs.weights,
            )
        assert calls.count == 2
        for result in (output, other):
            torch.testing.assert_close(result, on_cpu(inputs.value, shapes, inputs.locations, inputs.weights))
        expected = torch.autograd.grad(ms_deform_attn(*inputs.arguments), inputs.leaves, inputs.grad_output)
        for mine, theirs in zip(torch.autograd.grad(output, inputs.leaves, inputs.grad_output), expected, strict=True):
            torch.testing.assert_close(mine, theirs)
        assert mmcv.multi_scale_deformable_attn_pytorch is on_cpu


def test_what_cannot_be_patched(monkeypatch):
    with pytest.raises(ValueError, match="package is 'detrex'; expected one of 'mmcv', 'transformers'"):
        patch("detrex")
    for package in ("mmcv", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
        monkeypatch.delitem(sys.modules, "transformers.monkey_patching", raising=False)
        with pytest.raises(ImportError, match=f"patch\\('{package}'\\) finds no deformable attention of {package}"):
            patch(package)
    monkeypatch.setitem(sys.modules, "mmcv", ModuleType("mmcv"))
    with pytest.raises(ImportError, match="patch\\('mmcv'\\)"):
        patch("mmcv")
