"""Networks of timm by name: equal to timm's own forward pass, at any size."""

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
MODELS = {
    "vit_small_patch16_dinov3": SMALL,  # rotary positions and registers
    "eva02_tiny_patch14_224": {"depth": 2},  # rotary and absolute positions
    "vit_small_patch16_rope_mixed_224": {"depth": 2},  # learned rotary positions per block
    "vit_base_patch16_siglip_256": SMALL,  # no class token
    "vit_small_patch14_reg4_dinov2": SMALL,  # registers
    "vit_base_patch16_clip_224": SMALL,  # norm before the first block
    "vit_tiny_patch16_224": {"depth": 2},
    "convnext_atto": {},
    "convnextv2_atto": {},  # global response norm
}


def build(name, randomize, **options):
    network = TimmConfig(name=name, options=MODELS[name], **options)
    return randomize(build_branch(BranchConfig(network=network, image_size=224))).eval()


def run(branch, image):
    return branch.run(branch.embed(image), 0, branch.num_blocks)


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (112, 168)])
@pytest.mark.parametrize("name", MODELS)
def test_features_are_timms(name, size, randomize):
    branch = build(name, randomize)
    options = {} if name.startswith("convnext") else {"dynamic_img_size": True}
    theirs = timm.create_model(name, num_classes=0, **MODELS[name], **options).eval()
    missing = theirs.load_state_dict(branch.model.state_dict(), strict=False).missing_keys
    # what branches do without: final norm, pooling, head
    assert {key.split(".")[0] for key in missing} <= {"norm", "norm_pre", "fc_norm", "head", "attn_pool"}
    for part in ("norm", "norm_pre") if name.startswith("convnext") else ("norm",):
        setattr(theirs, part, nn.Identity())
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
            torch.testing.assert_close(state.prefix, expected[:, :count])
        expected = expected[:, count:].unflatten(1, state.tokens.shape[1:3])
    torch.testing.assert_close(state.tokens, expected)


def test_another_patch_size():
    network = TimmConfig(name="vit_small_patch14_reg4_dinov2", patch_size=16, options=SMALL)
    branch = build_branch(BranchConfig(network=network, image_size=224))
    assert network.strides == (16, 16) and branch.embed(torch.randn(1, 3, 70, 100)).tokens.shape == (1, 4, 6, 48)


def test_windows_without_prefix_tokens(randomize):
    network = TimmConfig(name="vit_tiny_patch16_224", keep_prefix_tokens=False, options={"depth": 2})
    assert network.no_windows == ""
    branch = randomize(build_branch(BranchConfig(network=network, image_size=128, window_size=4))).eval()
    image = torch.randn(1, 3, 128, 64)
    state = branch.embed(image)
    assert state.prefix is None
    block = branch.model.blocks[0]
    halves = [block.attn(half) for half in state.tokens.split(4, dim=1)]
    torch.testing.assert_close(block.attn(state.tokens), torch.cat(halves, dim=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vit_tinny_patch16_224"}, "no such model; close matches are vit_tiny_patch16_224"),
        ({"name": "swin_tiny_patch4_window7_224"}, "class is SwinTransformer; expected VisionTransformer, Eva or"),
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
    assert report.flops_published_count is None


@pytest.mark.parametrize("keep", [True, False])
def test_pretrained_weights_of_timm(keep, tmp_path):
    """With the class token its position entry is kept, without it both are dropped; the grid is resized."""
    theirs = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    options = {"depth": 2, "img_size": 128}
    network = TimmConfig(name="vit_tiny_patch16_224", keep_prefix_tokens=keep, options=options)
    branch = build_branch(BranchConfig(network=network, image_size=128))
    report = load_branch(branch, str(tmp_path / "timm.safetensors"))
    assert ("cls_token" in report.ignored) == (not keep)
    table = branch.model.state_dict()["pos_embed"]
    assert table.shape == (1, 64 + keep, 192)
    if keep:
        assert torch.equal(table[:, 0], theirs.pos_embed[:, 0])
    assert torch.equal(branch.model.blocks[1].mlp.fc1.weight, theirs.blocks[1].mlp.fc1.weight)
