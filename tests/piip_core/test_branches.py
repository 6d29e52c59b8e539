import pytest
import timm
import torch
import torch.nn.functional as F

from piip_core import BranchConfig, ViTConfig
from piip_core.branches import build_branch
from piip_core.branches.transformer import MapAttention, resize_position_grid

DEIT_TINY = ViTConfig(embed_dim=192, depth=12, num_heads=3, layer_scale=None)


def run_all(branch, image):
    return branch.run(branch.embed(image), 0, branch.num_blocks)


@pytest.fixture(scope="module")
def deit_tiny():
    torch.manual_seed(0)
    return build_branch(BranchConfig(network=DEIT_TINY, image_size=224)).eval()


def test_equals_timm(deit_tiny):
    """The same weights in timm's own model give the same tokens."""
    reference = timm.create_model("deit_tiny_patch16_224", class_token=False, global_pool="avg", num_classes=0).eval()
    missing, unexpected = reference.load_state_dict(deit_tiny.model.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("fc_norm") for name in missing)
    image = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = reference.forward_intermediates(image, indices=1, intermediates_only=True, norm=False)[0]
        tokens = run_all(deit_tiny, image).tokens
    torch.testing.assert_close(tokens.permute(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-4)


def test_class_token_equals_timm():
    torch.manual_seed(0)
    network = ViTConfig(embed_dim=192, depth=12, num_heads=3, layer_scale=None, class_token=True)
    branch = build_branch(BranchConfig(network=network, image_size=224)).eval()
    torch.nn.init.normal_(branch.model.cls_token)
    reference = timm.create_model("deit_tiny_patch16_224", no_embed_class=True, num_classes=0).eval()
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


def test_padding_after_qkv_differs_only_where_padding_is_needed(randomize):
    attention = randomize(MapAttention(16, num_heads=2, qkv_bias=True)).eval()
    attention.window_size = 3
    for size, equal in (((6, 6), True), ((6, 7), False)):
        x = torch.randn(1, *size, 16)
        attention.pad_before_qkv = True
        before = attention(x)
        attention.pad_before_qkv = False
        assert torch.allclose(before, attention(x), atol=1e-5) == equal


def test_layers_of_parameters(deit_tiny):
    layers = {name: deit_tiny.layer_of(name) for name, _ in deit_tiny.named_parameters()}
    assert layers["model.pos_embed"] == layers["model.patch_embed.proj.weight"] == 0
    assert layers["model.blocks.0.attn.qkv.weight"] == 1 and layers["model.blocks.11.mlp.fc2.bias"] == 12
    assert None not in layers.values()
