"""Drawn attention weights against softmax(q k) written out in float64, cell by cell."""

import math
from dataclasses import replace

import pytest
import torch

from piip_core import BranchConfig, InteractionConfig, PIIPConfig
from piip_core.branches import BEiTConfig, ConvNeXtConfig, UniPerceiverConfig, ViTConfig
from piip_core.errors import UserError
from piip_core.pyramid import PIIP, resize_for_branch
from piip_core.visualization import trace_pyramid

HEADS = 4
NETWORKS = {
    "vit": ViTConfig(embed_dim=32, depth=2, num_heads=HEADS, pos_grid=4),
    "no qkv bias": ViTConfig(embed_dim=32, depth=2, num_heads=HEADS, pos_grid=4, qkv_bias=False),
    "qk norm": ViTConfig(embed_dim=32, depth=2, num_heads=HEADS, pos_grid=4, qk_norm=True),
    "uniperceiver": UniPerceiverConfig(embed_dim=32, depth=2, num_heads=HEADS, pos_grid=4, layer_scale=1.0),
    "beit": BEiTConfig(embed_dim=32, depth=2, num_heads=HEADS, bias_window=3),
}


def single(network, randomize, **options) -> PIIP:
    branch = BranchConfig(network=network, image_size=128, **options)
    return randomize(PIIP(PIIPConfig(branches=(branch,), merging=None))).eval()


def keys_and_query(attention, block, state, cell, pad_before):
    """Float64 keys (heads, rows, columns, d) of a function of the position, and the query (heads, d)."""
    tokens = block.norm1(state.tokens)[0].double()
    width = tokens.shape[-1]
    weight = attention.qkv.weight.double()
    if isinstance(attention.qkv.bias, torch.Tensor):
        bias = attention.qkv.bias.double()
    elif getattr(attention, "q_bias", None) is not None:  # BEiT: keys have none
        bias = torch.cat((attention.q_bias, torch.zeros(width), attention.v_bias)).double()
    else:
        bias = torch.zeros(3 * width).double()

    def project(token, part):
        projected = weight[part * width : (part + 1) * width] @ token + bias[part * width : (part + 1) * width]
        norm = (attention.q_norm, attention.k_norm)[part] if hasattr(attention, "q_norm") else torch.nn.Identity()
        return norm.double()(projected).view(HEADS, -1)

    def key(row, column):
        if row < tokens.shape[0] and column < tokens.shape[1]:
            return project(tokens[row, column], 1)
        return project(torch.zeros(width).double(), 1) if pad_before else torch.zeros(HEADS, width // HEADS).double()

    return key, project(tokens[cell], 0)


@torch.no_grad()
def explicit_attention(pyramid, scene, cell, window, pad_before=True):
    """Weights {(row, column): (heads,)} of all cells of the query's window in block 0, padding included."""
    branch = pyramid.branches[0]
    state = branch.embed(resize_for_branch(scene.pixel_values, 1.0))
    block = branch.model.blocks[0]
    key, query = keys_and_query(block.attn, block, state, cell, pad_before)
    height, width = (window, window) if window else state.tokens.shape[1:3]
    top, left = (cell[0] // height * height, cell[1] // width * width)
    logits = {}
    for row in range(top, top + height):
        for column in range(left, left + width):
            logit = (query * key(row, column)).sum(-1) / math.sqrt(query.shape[-1])
            if hasattr(block.attn, "relative_position_bias_table"):
                dy, dx = cell[0] - row + window - 1, cell[1] - column + window - 1
                logit = logit + block.attn.relative_position_bias_table[dy * (2 * window - 1) + dx].double()
            logits[row, column] = logit
    total = sum(logit.exp() for logit in logits.values())
    return {position: logit.exp() / total for position, logit in logits.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_attention_in_a_padded_window(name, randomize, make_scene):
    scene = make_scene(query=(127, 70))  # 8 x 6 cells of 16 pixels; windows of 3: the last column window is padded
    pyramid = single(NETWORKS[name], randomize, window_size=3)
    row = trace_pyramid(pyramid, scene, blocks=[0]).views[0].attention
    expected = explicit_attention(pyramid, scene, cell=(4, 7), window=3)
    assert len(expected) == 9 and row.window == (3, 6, 6, 8)
    for (y, x), weights in expected.items():
        if x < 8:
            torch.testing.assert_close(row.weights[:, y, x], weights, rtol=0, atol=1e-6)
    padding = sum(weights for (_, x), weights in expected.items() if x >= 8)
    torch.testing.assert_close(row.padding, padding, rtol=0, atol=1e-6)
    assert float(padding.min()) > 0.01
    outside = row.weights.clone()
    outside[:, 3:6, 6:8] = 0
    assert outside.count_nonzero() == 0
    torch.testing.assert_close(row.weights.sum((1, 2)) + row.padding, torch.ones(HEADS).double(), rtol=0, atol=1e-12)


def test_zero_keys_of_padding_after_the_projection(randomize, make_scene):
    scene = make_scene(query=(127, 70))
    pyramid = single(NETWORKS["vit"], randomize, window_size=3, window_padding="after_qkv")
    row = trace_pyramid(pyramid, scene, blocks=[0]).views[0].attention
    expected = explicit_attention(pyramid, scene, (4, 7), window=3, pad_before=False)
    torch.testing.assert_close(row.weights[:, 5, 6], expected[5, 6], rtol=0, atol=1e-6)
    torch.testing.assert_close(row.padding, sum(expected[y, 8] for y in (3, 4, 5)), rtol=0, atol=1e-6)


def test_global_attention(randomize, make_scene):
    scene = make_scene(query=(20, 40))
    pyramid = single(NETWORKS["vit"], randomize)
    row = trace_pyramid(pyramid, scene, blocks=[0]).views[0].attention
    expected = explicit_attention(pyramid, scene, cell=(2, 1), window=None)
    assert row.window == (0, 0, 6, 8) and row.padding.count_nonzero() == 0
    for (y, x), weights in expected.items():
        torch.testing.assert_close(row.weights[:, y, x], weights, rtol=0, atol=1e-6)


def test_class_token_takes_its_share(randomize, make_scene):
    scene = make_scene(query=(20, 40))
    pyramid = single(replace(NETWORKS["vit"], class_token=True), randomize)
    row = trace_pyramid(pyramid, scene, blocks=[0]).views[0].attention
    block, width = pyramid.branches[0].model.blocks[0], 32
    with torch.no_grad():
        state = pyramid.branches[0].embed(scene.pixel_values)
        tokens = block.norm1(torch.cat((state.prefix, state.tokens.flatten(1, 2)), dim=1))[0]
        q, k, _ = (tokens.double() @ block.attn.qkv.weight.double().T + block.attn.qkv.bias.double()).split(width, -1)
    position = 1 + 2 * 8 + 1
    q, k = q[position].view(HEADS, -1), k.view(-1, HEADS, width // HEADS)
    weights = ((q * k).sum(-1) / math.sqrt(width // HEADS)).softmax(dim=0).T
    torch.testing.assert_close(row.prefix, weights[:, :1], rtol=0, atol=1e-6)
    torch.testing.assert_close(row.weights.flatten(1), weights[:, 1:], rtol=0, atol=1e-6)


def test_unfused_attention_is_refused(randomize, make_scene):
    pyramid = single(NETWORKS["vit"], randomize)
    pyramid.branches[0].model.blocks[1].attn.fused_attn = False
    with pytest.raises(UserError, match="unset TIMM_FUSED_ATTN"):
        trace_pyramid(pyramid, make_scene())


def test_looking_changes_nothing(tiny_model, make_scene):
    scene = make_scene()
    with torch.no_grad():
        expected = tiny_model.pyramid(scene.pixel_values)
    trace_pyramid(tiny_model.pyramid, scene)
    assert all("run_block" not in vars(branch) for branch in tiny_model.pyramid.branches)
    assert not any(module._forward_hooks for module in tiny_model.modules())
    with torch.no_grad():
        for before, after in zip(expected, tiny_model.pyramid(scene.pixel_values), strict=True):
            torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_convnext_shows_energy(randomize, make_scene):
    scene = make_scene()
    network = ConvNeXtConfig(depths=(1, 1, 1, 1), stage_dims=(16, 16, 32, 32), layer_scale=None)
    pyramid = single(network, randomize)
    view = trace_pyramid(pyramid, scene, blocks=[2]).views[0]
    branch = pyramid.branches[0]
    with torch.no_grad():
        tokens = branch.run(branch.embed(scene.pixel_values), 0, 3).tokens[0]
    assert view.attention is None and view.cells.size == (8, 8)
    torch.testing.assert_close(view.energy[3, 5].item(), (tokens[3, 5].square().mean() ** 0.5).item())


def test_cells_of_a_smaller_branch(tiny_config, randomize, make_scene):
    """Branch 1 sees the image at half the size: its cells are twice as large on the image."""
    config = tiny_config(interaction=InteractionConfig(num_interactions=2, num_heads=4))
    views = trace_pyramid(randomize(PIIP(config)).eval(), make_scene(query=(70, 50))).views
    assert [view.cells.size for view in views] == [(32, 32), pytest.approx((128 / 6, 128 / 6)), (16, 16)]
    assert [view.cell for view in views] == [(1, 2), (2, 3), (3, 4)]
