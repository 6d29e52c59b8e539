"""Networks of timm by name: equal to timm's own forward pass, at any size."""

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from piip_core import PIIP, BranchConfig, ConfigError, InteractionConfig, PIIPConfig, TimmConfig
from piip_core.branches import build_branch
from piip_core.checkpoints.pretrained import load_branch
from piip_tools.flops.executed import analyze_backbone

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 4}
TRANSFORMERS = {
    "vit_small_patch16_dinov3": SMALL,  # rotary positions and registers
    "vit_small_plus_patch16_dinov3_qkvb": SMALL,  # gated MLPs, biases of queries, keys and values
    "eva02_tiny_patch14_224": {"depth": 2},  # rotary and absolute positions
    "vit_pe_core_base_patch16_224": SMALL,  # the same, norm before the first block
    "vit_pe_spatial_tiny_patch16_512": {"depth": 2},  # layer scale
    "vit_small_patch16_rope_mixed_224": {"depth": 2},  # learned rotary positions of each block
    "vit_base_patch16_siglip_256": SMALL,  # no class token
    "naflexvit_base_patch16_siglip": SMALL,
    "naflexvit_base_patch16_radio_v3": SMALL,  # eight prefix tokens
    "vit_base_patch16_radio_v3": SMALL,
    "vit_small_patch14_reg4_dinov2": SMALL,  # registers
    "vit_base_patch16_clip_224": SMALL,  # norm before the first block
    "vit_tiny_patch16_224": {"depth": 2},
}
MODELS = TRANSFORMERS | {
    "vit_base_patch16_xp_224": SMALL,  # attention and MLP side by side: no windows
    "vit_small_patch16_18x2_224": SMALL,  # two of each
    "convnext_atto": {},
    "convnextv2_atto": {},  # global response norm
}


def build(name, randomize, **options):
    network = TimmConfig(name=name, options=MODELS[name])
    return randomize(build_branch(BranchConfig(network=network, image_size=224, **options))).eval()


def run(branch, image):
    return branch.run(branch.embed(image), 0, branch.num_blocks)


def timms_own(name, branch):
    """timm's model with the weights of the branch, and without the norm that branches do without."""
    options = {} if name.startswith(("convnext", "naflex")) else {"dynamic_img_size": True}
    theirs = timm.create_model(name, num_classes=0, **MODELS[name], **options).eval()
    missing = theirs.load_state_dict(branch.model.state_dict(), strict=False).missing_keys
    # what branches do without: final norm, pooling, head
    assert {key.split(".")[0] for key in missing} <= {"norm", "norm_pre", "fc_norm", "head", "attn_pool"}
    for part in ("norm", "norm_pre") if name.startswith("convnext") else ("norm",):
        setattr(theirs, part, nn.Identity())
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (112, 168)])
@pytest.mark.parametrize("name", MODELS)
def test_features_are_timms(name, size, randomize):
    branch = build(name, randomize)
    theirs = timms_own(name, branch)
    stride = branch.strides[-1]
    image = torch.randn(2, 3, *(side // stride * stride for side in size))
    expected = theirs.forward_features(image)
    state = run(branch, image)
    if expected.ndim == 4:
        expected = expected.permute(0, 2, 3, 1)
    else:
        count = theirs.num_prefix_tokens
        assert (state.prefix is None) == (count == 0)
        if count:
            torch.testing.assert_close(state.prefix, expected[:, :count], rtol=0, atol=0)
        expected = expected[:, count:].unflatten(1, state.tokens.shape[1:3])
    torch.testing.assert_close(state.tokens, expected, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(("grid", "size"), [((4, 6), (4, 3)), ((7, 5), (4, 3))])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_windows_are_a_mask_in_float64(name, grid, size, randomize):
    """timm's own attention on the whole sequence, once for each window: everything outside but the prefix is masked."""
    branch = build(name, randomize, window_size=(4, None)).double()
    image = torch.randn(2, 3, *(branch.strides[0] * length for length in grid), dtype=torch.float64)
    first = branch.embed(image)
    state = branch.run(first, 0, 2)

    theirs = timms_own(name, branch).double()
    prefix, tokens = first.prefix, first.tokens.flatten(1, 2)
    count = 0 if prefix is None else prefix.shape[1]
    sequence = tokens if prefix is None else torch.cat((prefix, tokens), dim=1)
    options = [{}, {}]
    if getattr(theirs, "rope", None) is not None:
        rotary = theirs.rope.get_embed(shape=grid)
        options = [{"rope": rotary[i] if rotary.ndim == 4 else rotary} for i in range(2)]
    rows, columns = torch.meshgrid(*map(torch.floor_divide, map(torch.arange, grid), size), indexing="ij")
    windows = (rows * 10 + columns).flatten()
    attention, copies = theirs.blocks[0].attn.forward, []

    def masked(x, *, attn_mask, **more):
        found = torch.empty_like(x)
        for window in windows.unique():
            inside = torch.cat((torch.ones(count, dtype=torch.bool), windows == window))
            one = attention(x, attn_mask=inside.expand(1, 1, len(inside), -1), **more)
            found[:, count:][:, windows == window] = one[:, count:][:, windows == window]
            copies.append(one[:, :count])
        found[:, :count] = torch.stack(copies).mean(dim=0)
        return found

    theirs.blocks[0].attn.forward = masked
    expected = theirs.blocks[1](theirs.blocks[0](sequence, **options[0]), **options[1])
    torch.testing.assert_close(state.tokens.flatten(1, 2), expected[:, count:], rtol=0, atol=1e-12)
    if count:
        torch.testing.assert_close(state.prefix, expected[:, :count], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_pe_core_base_patch16_224"])
def test_windows_in_16_bit(name, dtype, randomize):
    """Weights of 16 bits, and autocast, which also computes gradients."""
    image = torch.randn(1, 3, 48, 80)
    branch = build(name, randomize, window_size=2)
    expected = run(branch, image).tokens
    with torch.autocast("cpu", dtype):
        autocast = run(branch, image).tokens
    autocast.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in branch.parameters())
    cast = run(copy.deepcopy(branch).to(dtype), image.to(dtype)).tokens
    for found in (autocast, cast):
        difference = (found.float() - expected).norm() / expected.norm()
        assert 0 < difference < 0.03


def test_another_patch_size():
    network = TimmConfig(name="vit_small_patch14_reg4_dinov2", patch_size=16, options=SMALL)
    branch = build_branch(BranchConfig(network=network, image_size=224))
    assert network.strides == (16, 16) and branch.embed(torch.randn(1, 3, 70, 100)).tokens.shape == (1, 4, 6, 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vit_tinny_patch16_224"}, "no such model; close matches are vit_tiny_patch16_224"),
        (
            {"name": "swin_tiny_patch4_window7_224"},
            "class is SwinTransformer; expected one of VisionTransformer, Eva, Na",
        ),
        ({"name": "resnet50"}, "class is ResNet"),
        ({"name": "beitv2_base_patch16_224"}, "BEiTConfig describes BEiT"),
        ({"name": "convnextv2_atto", "patch_size": 16}, "expected None for 'convnextv2_atto'"),
        ({"name": "vit_tiny_patch16_224", "options": {"colour": "red"}}, "colour"),
        ({"name": 3}, "the name of a model"),
    ],
)
def test_what_does_not_fit_is_said_at_once(options, message):
    with pytest.raises(ConfigError, match=message):
        TimmConfig(**options)


def test_a_pyramid_of_three_families(randomize):
    names = ("vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "convnextv2_atto")
    branches = tuple(
        BranchConfig(network=TimmConfig(name=name, options=MODELS[name]), image_size=size)
        for name, size in zip(names, (64, 84, 128), strict=True)
    )
    interaction = InteractionConfig(num_interactions=2, num_heads=4)
    config = PIIPConfig(branches=branches, interaction=interaction, merging=None)
    assert config.segments(3) == ((0, 7), (8, 14))  # spread evenly
    assert PIIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = randomize(PIIP(config))
    maps = model(torch.randn(1, 3, 128, 96))
    assert [m.shape[1:] for m in maps] == [(48, 4, 3), (192, 6, 4), (320, 4, 3)]
    sum(m.square().mean() for m in maps).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    report = analyze_backbone(config, (128, 96))
    assert report.flops > 0 and report.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("keep", [True, False])
def test_pretrained_weights_of_timm(keep, tmp_path):
    """With the class token its position entry is kept, without it both are dropped; the grid is resized."""
    theirs = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    options = {"depth": 2, "img_size": 128, "class_token": keep}
    network = TimmConfig(name="vit_tiny_patch16_224", options=options)
    branch = build_branch(BranchConfig(network=network, image_size=128))
    report = load_branch(branch, str(tmp_path / "timm.safetensors"))
    assert ("cls_token" in report.ignored) == (not keep)
    table = branch.model.state_dict()["pos_embed"]
    assert table.shape == (1, 64 + keep, 192)
    if keep:
        assert torch.equal(table[:, 0], theirs.pos_embed[:, 0])
    assert torch.equal(branch.model.blocks[1].mlp.fc1.weight, theirs.blocks[1].mlp.fc1.weight)
