"""Plain ViTs against timm and masked attention; InternViT and Uni-Perceiver against their formulas in float64."""

import dataclasses
import math
import time

import pytest
import timm
import torch
import torch.nn.functional as F

from piip_core import BranchConfig, ViTConfig, zoo
from piip_core.branches import UniPerceiverConfig, build_branch
from piip_core.branches.transformer import FullWidthNormAttention, MapAttention, resize_position_grid
from piip_core.meta import on_meta

INTERNVIT = ViTConfig(
    embed_dim=24, depth=2, num_heads=3, pos_grid=4, qkv_bias=False, layer_scale=0.1, norm="rmsnorm", qk_norm=True
)
DEIT_TINY = ViTConfig(embed_dim=192, depth=2, num_heads=3, layer_scale=None)
UNIPERCEIVER = UniPerceiverConfig(embed_dim=24, depth=2, num_heads=3, pos_grid=4, num_frames=3)


def run_all(branch, image):
    return branch.run(branch.embed(image), 0, branch.num_blocks)


@pytest.fixture(scope="module")
def deit_tiny():
    torch.manual_seed(0)
    return build_branch(BranchConfig(network=DEIT_TINY, image_size=224)).eval()


def test_equals_timm(deit_tiny):
    """The same weights in timm's own model give the same tokens."""
    reference = timm.create_model(
        "deit_tiny_patch16_224", depth=2, class_token=False, global_pool="avg", num_classes=0
    ).eval()
    missing, unexpected = reference.load_state_dict(deit_tiny.model.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("fc_norm") for name in missing)
    image = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = reference.forward_intermediates(image, indices=1, intermediates_only=True, norm=False)[0]
        tokens = run_all(deit_tiny, image).tokens
    torch.testing.assert_close(tokens.permute(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-4)


def test_class_token_equals_timm():
    torch.manual_seed(0)
    network = ViTConfig(embed_dim=192, depth=2, num_heads=3, layer_scale=None, class_token=True)
    branch = build_branch(BranchConfig(network=network, image_size=224)).eval()
    torch.nn.init.normal_(branch.model.cls_token)
    reference = timm.create_model("deit_tiny_patch16_224", depth=2, no_embed_class=True, num_classes=0).eval()
    reference.norm = torch.nn.Identity()
    assert not reference.load_state_dict(branch.model.state_dict(), strict=False).unexpected_keys
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        state, expected = run_all(branch, image), reference.forward_features(image)
    torch.testing.assert_close(state.prefix, expected[:, :1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.tokens.flatten(1, 2), expected[:, 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(224, 224), (160, 256), (170, 215)])
def test_any_size_and_remainder(deit_tiny, size):
    """Sides that are no multiple of the patch lose their remainder."""
    image = torch.randn(1, 3, *size)
    cut = image[..., : size[0] // 16 * 16, : size[1] // 16 * 16]
    state = deit_tiny.embed(image)
    assert state.tokens.shape == (1, size[0] // 16, size[1] // 16, 192)
    torch.testing.assert_close(state.tokens, deit_tiny.embed(cut).tokens)


def test_position_grid_is_resized_without_antialiasing():
    grid = torch.randn(1, 16, 5)
    resized = resize_position_grid(grid, 3, 7)
    expected = F.interpolate(grid.view(1, 4, 4, 5).permute(0, 3, 1, 2), size=(3, 7), mode="bicubic")
    torch.testing.assert_close(resized, expected.permute(0, 2, 3, 1))
    assert torch.equal(resize_position_grid(grid, 4, 4), grid.view(1, 4, 4, 5))


def masked_attention(attention, x, window):
    """Attention inside windows of an already padded map, by masking global attention: an independent formulation."""
    height, width = x.shape[1:3]
    rows, columns = torch.meshgrid(torch.arange(height) // window, torch.arange(width) // window, indexing="ij")
    label = (rows * 1000 + columns).flatten()
    mask = label[:, None] == label[None]
    return MapAttention.forward(attention, x.flatten(1, 2), attn_mask=mask).view_as(x)


@pytest.mark.parametrize("size", [(6, 9), (5, 7), (2, 2)])
def test_window_attention_equals_masked_attention(size, randomize):
    attention = randomize(MapAttention(16, num_heads=2, qkv_bias=True)).eval()
    attention.window_size = 3
    x = torch.randn(2, *size, 16)
    padded = F.pad(x, (0, 0, 0, -size[1] % 3, 0, -size[0] % 3))
    expected = masked_attention(attention, padded, 3)[:, : size[0], : size[1]]
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-5)


def values_of(module):
    """All parameters of a module in float64, by name."""
    return {name: parameter.detach().double() for name, parameter in module.named_parameters()}


def rms_norm(x, weight, eps=1e-6):
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x, weight, bias, eps):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight + bias


def attend(q, k, v, heads):
    """Attention of sequences (N, C) head by head."""
    parts = zip(*(t.chunk(heads, dim=1) for t in (q, k, v)), strict=True)
    return torch.cat([(qh @ kh.T / math.sqrt(qh.shape[1])).softmax(dim=1) @ vh for qh, kh, vh in parts], dim=1)


def normalised_attention(value, x, heads, prefix=""):
    """Self-attention (N, C) whose queries and keys are normalised over all heads together."""
    q, k, v = (x @ weight.T for weight in value[f"{prefix}qkv.weight"].chunk(3))
    q, k = rms_norm(q, value[f"{prefix}q_norm.weight"]), rms_norm(k, value[f"{prefix}k_norm.weight"])
    return attend(q, k, v, heads) @ value[f"{prefix}proj.weight"].T + value[f"{prefix}proj.bias"]


def patches(value, image, grid):
    """Patch embeddings (N, C) of one image, with the position table of exactly that grid."""
    unfolded = F.unfold(image.double(), 16, stride=16)[0].T
    return unfolded @ value["patch_embed.proj.weight"].flatten(1).T + value["patch_embed.proj.bias"] + grid


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_internvit_is_its_formula(activation, randomize):
    network = dataclasses.replace(INTERNVIT, activation=activation)
    branch = randomize(build_branch(BranchConfig(network=network, image_size=64))).eval()
    value, image = values_of(branch.model), torch.randn(1, 3, 64, 64)
    x = patches(value, image, value["pos_embed"][0])
    for i in range(2):
        block = {name.removeprefix(f"blocks.{i}."): tensor for name, tensor in value.items()}
        normed = rms_norm(x, block["norm1.weight"])
        x = x + block["ls1.gamma"] * normalised_attention(block, normed, 3, "attn.")
        hidden = rms_norm(x, block["norm2.weight"]) @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"]
        if activation == "gelu":
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        else:
            inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
            hidden = hidden * 0.5 * (1 + torch.tanh(inner))
        x = x + block["ls2.gamma"] * (hidden @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"])
    with torch.no_grad():
        tokens = branch.run(branch.embed(image), 0, 2).tokens
    # The two activations differ by up to 5e-4, so the tolerance tells them apart
    torch.testing.assert_close(tokens[0].flatten(0, 1).double(), x, rtol=1e-5, atol=1e-5)


def full_width_attention(randomize):
    norm = dataclasses.replace(INTERNVIT, depth=1)
    block = build_branch(BranchConfig(network=norm, image_size=64)).model.blocks[0]
    assert isinstance(block.attn, FullWidthNormAttention)
    return randomize(block.attn).eval()


@pytest.mark.parametrize("pad_before_qkv", [True, False])
@pytest.mark.parametrize("size", [(6, 3), (5, 4)])
@torch.no_grad()
def test_normalised_attention_in_windows(size, pad_before_qkv, randomize):
    """Without a bias, padding is zero before and after the projection, and before and after the norm."""
    attention = full_width_attention(randomize)
    attention.window_size, attention.pad_before_qkv = 3, pad_before_qkv
    x = torch.randn(1, *size, 24)
    padded = F.pad(x, (0, 0, 0, -size[1] % 3, 0, -size[0] % 3)).double()
    expected = torch.empty_like(padded)
    for top in range(0, padded.shape[1], 3):
        for left in range(0, padded.shape[2], 3):
            window = padded[0, top : top + 3, left : left + 3]
            result = normalised_attention(values_of(attention), window.flatten(0, 1), 3)
            expected[0, top : top + 3, left : left + 3] = result.view_as(window)
    expected = expected[:, : size[0], : size[1]].float()
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-5)


def test_internvit_6b_needs_no_memory_on_the_meta_device():
    """5.9 G parameters (paper, Table IV) in seconds; the time is what this process computes."""
    start = time.process_time()
    with on_meta():
        branch = build_branch(zoo.get("internvit_6b_1024").config.branches[0])
    assert time.process_time() - start < 5
    assert sum(p.numel() for p in branch.parameters()) / 1e6 == pytest.approx(5903.17, abs=0.005)
    assert all(tensor.is_meta for tensor in (*branch.parameters(), *branch.buffers()))
    assert (branch.config.network.norm, branch.config.network.num_heads) == ("rmsnorm", 25)


def test_uniperceiver_embeds_patch_position_and_frame_and_normalises(randomize):
    branch = randomize(build_branch(BranchConfig(network=UNIPERCEIVER, image_size=64))).eval()
    value, image = values_of(branch.model), torch.randn(1, 3, 64, 64)
    x = patches(value, image, value["pos_embed"][0]) + value["frame_embed"][0]
    expected = layer_norm(x, value["norm_pre.weight"], value["norm_pre.bias"], 1e-5)
    embedded = branch.embed(image).tokens
    torch.testing.assert_close(embedded[0].flatten(0, 1).double(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        branch.model.frame_embed[1:] = 1e3  # an image is frame 0: the others have no influence
    torch.testing.assert_close(branch.embed(image).tokens, embedded)


def test_uniperceiver_starts_as_the_identity_after_its_embeddings():
    """Layer scales start at zero, as published."""
    branch = build_branch(BranchConfig(network=UNIPERCEIVER, image_size=64)).eval()
    state = branch.embed(torch.randn(1, 3, 64, 64))
    torch.testing.assert_close(branch.run(state, 0, 2).tokens, state.tokens)
