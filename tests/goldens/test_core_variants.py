"""Checkers take every number from the case: cases of the same families with other numbers pass, wrong ones fail."""

from pathlib import Path

import pytest
import torch

from checkers import GoldenCase, Status
from checkers.losses import recorded_loss
from written_cases import failed, recorded, run_written


@pytest.fixture(params=[(24, 3, 1, 2, 0.5, 10), (16, 4, 3, 5, 1.0, 16), (12, 2, 2, 1, 2.0, 7)], ids=str)
def operator(request):
    """An operator of other sizes, in float64, by transformers' formulation of the sampling."""
    modeling = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    width, heads, levels, points, ratio, features = request.param
    generator = torch.Generator().manual_seed(width)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    inner, shapes = int(width * ratio), [(4, 6), (3, 2), (2, 2)][:levels]
    sizes = {
        "sampling_offsets": (heads * levels * points * 2, width),
        "attention_weights": (heads * levels * points, width),
        "value_proj": (inner, features),
        "output_proj": (width, inner),
    }
    state = {f"{name}.weight": 0.5 * random(*size) for name, size in sizes.items()}
    state |= {f"{name}.bias": random(size[0]) for name, size in sizes.items()}
    total = sum(h * w for h, w in shapes)
    query, feat = random(2, 5, width), random(2, total, features)
    reference = torch.rand(2, 5, levels, 2, dtype=torch.float64, generator=generator)
    hidden = torch.rand(2, total, generator=generator) < 0.3
    variables = {name: x.clone().requires_grad_() for name, x in (state | {"query": query, "feat": feat}).items()}

    def compute(mask):
        def linear(name, x):
            return torch.nn.functional.linear(x, variables[f"{name}.weight"], variables[f"{name}.bias"])

        value = linear("value_proj", variables["feat"])
        if mask is not None:
            value = value.masked_fill(mask[..., None], 0.0)
        offsets = linear("sampling_offsets", variables["query"]).view(2, 5, heads, levels, points, 2)
        weights = linear("attention_weights", variables["query"]).view(2, 5, heads, -1).softmax(-1)
        scale = torch.tensor([[w, h] for h, w in shapes], dtype=torch.float64)
        places = reference[:, :, None, :, None] + offsets / scale[:, None]
        sampled = modeling.MultiScaleDeformableAttention()(
            value.view(2, total, heads, -1),
            torch.tensor(shapes),
            shapes,
            None,
            places,
            weights.view(2, 5, heads, levels, points),
            64,
        )
        return linear("output_proj", sampled)

    tensors = {f"state.{name}": x for name, x in state.items()} | {
        "input.query": query,
        "input.feat": feat,
        "input.reference_points": reference,
        "input.spatial_shapes": torch.tensor(shapes),
        "input.padding_mask": hidden,
    }
    for variant, mask in {"nomask": None, "mask": hidden}.items():
        out = compute(mask)
        loss = (out.flatten() * torch.cos(0.51 * torch.arange(out.numel(), dtype=torch.float64))).sum()
        gradients = torch.autograd.grad(loss, list(variables.values()))
        tensors[f"output.{variant}"] = out.detach()
        tensors |= {f"grad.{variant}.{name}": g for name, g in zip(variables, gradients, strict=True)}
    info = {
        "name": "operator",
        "family": "op",
        "config": {
            "d_model": width,
            "n_heads": heads,
            "n_levels": levels,
            "n_points": points,
            "ratio": ratio,
            "d_feat": features,
        },
        "loss": "sum(out*cos(0.51*i)), i the row-major flat index",
        "tolerance": {"atol": 1e-10},
    }
    return info, tensors


def test_operators_of_other_sizes_pass(operator, tmp_path):
    result = run_written(tmp_path, *operator)
    assert result.status is Status.PASSED, str(result)
    info, tensors = operator
    tensors = {name: x for name, x in tensors.items() if ".mask" not in name}
    del tensors["input.padding_mask"]
    assert run_written(tmp_path, info, tensors).status is Status.PASSED


def test_an_operator_with_another_factor_of_the_loss_fails(operator, tmp_path):
    info, tensors = operator
    result = run_written(tmp_path, info | {"loss": "2*sum(out*cos(0.51*i))"}, tensors)
    assert failed(result) and all(name.startswith("grad.") for name in failed(result))


@pytest.mark.parametrize("name", ["det2_deit", "cls3_deit", "llava_clip_nocls_outshape"])
def test_other_batches_pass(name, tmp_path):
    info, tensors = recorded(name)
    image = tensors["input.image"]
    tensors = {key: x for key, x in tensors.items() if not key.startswith("grad.") and key != "output.loss"}
    parts = ("input", "output", "inter")
    tensors |= {key: torch.cat([x, x, x]) for key, x in tensors.items() if key.split(".")[0] in parts}
    assert len(tensors["input.image"]) == 3 * len(image)
    result = run_written(tmp_path, info, tensors)
    assert result.status is Status.PASSED, str(result)


def test_an_interaction_in_double_precision_passes(tmp_path):
    info, tensors = recorded("interaction_deform_proj_ln")
    result = run_written(tmp_path, info, {name: x.double() for name, x in tensors.items()})
    assert result.status is Status.PASSED, str(result)


def test_clip_weights_pass(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8
    )
    state = transformers.CLIPVisionModel(config).state_dict()
    tensors = {f"input.{name}": x for name, x in state.items() if "position_ids" not in name}
    names = {name: name.removeprefix("vision_model.") for name in state}
    kept = [
        name for name, bare in names.items() if not bare.startswith("post_layernorm") and "position_ids" not in bare
    ]
    tensors |= {f"output.clip_model.{names[name]}": state[name].clone() for name in kept}
    info = {"name": "load_clip", "family": "load_mapping", "tolerance": {"atol": 1e-6}}
    result = run_written(tmp_path, info, tensors)
    assert result.status is Status.PASSED, str(result)
    tensors["output.clip_model.encoder.layers.1.self_attn.k_proj.weight"] += 1e-3
    assert failed(run_written(tmp_path, info, tensors)) == [
        "output.clip_model.encoder.layers.1.self_attn.k_proj.weight"
    ]


def test_layer_scales_that_a_file_lacks_keep_other_constants(tmp_path):
    info, tensors = recorded("load_mae_no_ls")
    scales = [name for name in tensors if name.startswith("output.") and name.endswith("gamma")]
    tensors |= {name: torch.full_like(tensors[name], 0.25) for name in scales}
    assert scales and run_written(tmp_path, info, tensors).status is Status.PASSED
    tensors[scales[-1]][0] = 0.5
    assert failed(run_written(tmp_path, info, tensors)) == [scales[-1]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sum(out * cos(0.37*i)), i row-major flat index", lambda a, b: total(a, 0.37) + total(b, 0.37)),
        ("sum(a*cos(0.2*i)) + 3*sum(b*cos(0.4*i))", lambda a, b: total(a, 0.2) + 3 * total(b, 0.4)),
        (
            "sum over outputs of 5*mean(out * cos(1.5*i)) with i the index",
            lambda a, b: 5 * (total(a, 1.5) / 6 + total(b, 1.5) / 4),
        ),
    ],
)
def test_losses_are_what_their_texts_say(text, expected):
    outputs = torch.arange(6.0).view(2, 3) - 2, torch.arange(4.0)
    loss = recorded_loss(GoldenCase(Path("case.json"), {"loss": text}), outputs)
    assert loss.item() == pytest.approx(expected(*outputs), rel=1e-6)


def total(values, rate):
    index = torch.arange(values.numel(), dtype=torch.float64)
    return (values.flatten().double() * torch.cos(rate * index)).sum().item()
