"""Branch families against the libraries they come from and explicit float64 formulas."""

import dataclasses

import pytest
import torch
from timm.models.beit import Beit
from torch import nn

from piip_core import PIIP, BranchConfig, ConfigError, InteractionConfig, PIIPConfig, ViTConfig
from piip_core.branches import build_branch
from piip_core.checkpoints.branch_names import BRANCH_CLASSES
from piip_core.checkpoints.rules import RuleTable
from piip_core.networks import BEiTConfig, ConvNeXtConfig, NetworkConfig, UniPerceiverConfig

FAMILIES = {
    "rmsnorm": ViTConfig(embed_dim=32, depth=2, num_heads=4, pos_grid=4, norm="rmsnorm", qk_norm=True, qkv_bias=False),
    "tanh": ViTConfig(embed_dim=32, depth=2, num_heads=4, pos_grid=4, activation="gelu_tanh"),
    "beit": BEiTConfig(embed_dim=32, depth=2, num_heads=4, bias_window=4, layer_scale=0.1),
    "uniperceiver": UniPerceiverConfig(embed_dim=32, depth=2, num_heads=4, pos_grid=4, layer_scale=0.1),
    "convnext": ConvNeXtConfig(depths=(1, 2, 1, 1), stage_dims=(8, 16, 24, 32)),
}


def build(network: NetworkConfig, randomize, **options):
    options = {"window_size": 4 if network.family == "beit" else None} | options
    return randomize(build_branch(BranchConfig(network=network, image_size=64, **options))).eval()


def run(branch, image):
    return branch.run(branch.embed(image), 0, branch.num_blocks).tokens


def norm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_gradients_and_checkpointing(name, randomize):
    network = FAMILIES[name]
    branch, image = build(network, randomize), torch.randn(2, 3, 96, 64)
    assert (branch.dims, branch.strides) == (network.dims, network.strides)
    state = branch.embed(image)
    for index in range(branch.num_blocks):
        state = branch.run_block(state, index)
        stride = network.strides[index]
        assert state.tokens.shape == (2, 96 // stride, 64 // stride, network.dims[index])
    state.tokens.square().mean().backward()
    plain = {name: parameter.grad.clone() for name, parameter in branch.named_parameters()}
    branch.zero_grad()
    branch.set_grad_checkpointing()
    run(branch, image).square().mean().backward()
    for name, parameter in branch.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])
        assert parameter.grad.any() or name.endswith("frame_embed"), name


def test_full_width_qk_norm_by_hand(randomize):
    attention = build(FAMILIES["rmsnorm"], randomize).double().model.blocks[0].attn
    x = torch.randn(2, 4, 5, 32, dtype=torch.float64)
    q, k, v = attention.qkv(x.flatten(1, 2)).chunk(3, dim=2)
    q, k = norm(q, attention.q_norm.weight), norm(k, attention.k_norm.weight)
    heads = [t.unflatten(2, (4, 8)).transpose(1, 2) for t in (q, k, v)]
    logits = heads[0] @ heads[1].transpose(2, 3) * 8**-0.5
    expected = attention.proj((logits.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected.unflatten(1, (4, 5)))


@pytest.mark.parametrize("window", [None, 4])
def test_rms_norm_and_windows_of_qk_norm(window, randomize):
    branch = build(FAMILIES["rmsnorm"], randomize, window_size=window).double()
    block, x = branch.model.blocks[0], torch.randn(1, 8, 4, 32, dtype=torch.float64)
    torch.testing.assert_close(block.norm1(x), norm(x, block.norm1.weight))
    halves = [block.attn(half) for half in x.split(4, dim=1)]
    equal = torch.allclose(block.attn(x), torch.cat(halves, dim=1))
    assert equal == (window == 4)


def test_beit_attention_by_hand(randomize):
    """The bias of query and key is the table's row of their distance, gathered entry by entry."""
    attention = build(FAMILIES["beit"], randomize, window_size=None).double().model.blocks[0].attn
    x = torch.randn(2, 4, 4, 32, dtype=torch.float64)
    bias = torch.zeros(4, 16, 16, dtype=torch.float64)
    for query in range(16):
        for key in range(16):
            dy, dx = query // 4 - key // 4, query % 4 - key % 4
            bias[:, query, key] = attention.relative_position_bias_table[(dy + 3) * 7 + dx + 3]
    q, k, v = (x.flatten(1, 2) @ attention.qkv.weight.T).chunk(3, dim=2)
    q, v = q + attention.q_bias, v + attention.v_bias
    heads = [t.unflatten(2, (4, 8)).transpose(1, 2) for t in (q, k, v)]
    logits = heads[0] @ heads[1].transpose(2, 3) * 8**-0.5 + bias
    expected = attention.proj((logits.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected.unflatten(1, (4, 4)))


@torch.no_grad()
def test_beit_blocks_are_timms(randomize):
    """With keys of the class token masked out, timm's own blocks give the same patch tokens."""
    branch = build(FAMILIES["beit"], randomize, window_size=None)
    theirs = Beit(
        img_size=64, embed_dim=32, depth=2, num_heads=4, init_values=0.1, use_rel_pos_bias=True, use_abs_pos_emb=False
    ).eval()
    state = branch.model.state_dict()
    for name in list(state):
        if name.endswith("relative_position_bias_table"):
            # the rows after the patches' are class to patch, patch to class, class to class
            state[name] = torch.cat((state[name], torch.tensor([[0.0], [-1e9], [0.0]]).expand(3, 4)))
    theirs.load_state_dict(state, strict=False)
    for block in theirs.blocks:
        block.norm1.eps = block.norm2.eps = 1e-6
    image = torch.randn(1, 3, 64, 64)
    tokens = theirs.patch_embed(image)
    tokens = torch.cat((theirs.cls_token.expand(1, -1, -1), tokens), dim=1)
    for block in theirs.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(run(branch, image).flatten(1, 2), tokens[:, 1:], atol=1e-5, rtol=1e-4)


def test_beit_needs_its_window(randomize):
    with pytest.raises(ConfigError, match=r"window_size=5: expected BEiTConfig\.bias_window=4"):
        build(FAMILIES["beit"], randomize, window_size=5)
    branch = build(FAMILIES["beit"], randomize, window_size=None)
    with pytest.raises(ConfigError, match="got 6 x 4 tokens"):
        run(branch, torch.randn(1, 3, 96, 64))


def test_uniperceiver_embedding_by_hand(randomize):
    branch = build(FAMILIES["uniperceiver"], randomize)
    image, model = torch.randn(1, 3, 64, 64), branch.model
    patches = nn.functional.conv2d(image, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=16)
    tokens = patches.permute(0, 2, 3, 1) + model.pos_embed.unflatten(1, (4, 4)) + model.frame_embed[0]
    expected = nn.functional.layer_norm(tokens, (32,), model.norm_pre.weight, model.norm_pre.bias, eps=1e-5)
    torch.testing.assert_close(branch.embed(image).tokens, expected)


@torch.no_grad()
def test_convnext_equals_timms_own_forward(randomize):
    branch = build(FAMILIES["convnext"], randomize)
    image = torch.randn(2, 3, 96, 64)
    expected = branch.model.forward_features(image)
    torch.testing.assert_close(run(branch, image).permute(0, 3, 1, 2), expected)


@torch.no_grad()
def test_convnext_equals_that_of_transformers(randomize):
    transformers = pytest.importorskip("transformers")
    branch = build(FAMILIES["convnext"], randomize)
    config = transformers.ConvNextConfig(depths=[1, 2, 1, 1], hidden_sizes=[8, 16, 24, 32])
    theirs = transformers.ConvNextModel(config).eval()
    table = RuleTable(BRANCH_CLASSES["convnext"])
    state = {
        table.to_published(name)[0].removeprefix("convnext_model."): tensor
        for name, tensor in branch.model.state_dict().items()
    }
    assert set(theirs.load_state_dict(state, strict=False).missing_keys) == {"layernorm.weight", "layernorm.bias"}
    image = torch.randn(1, 3, 64, 96)
    expected = theirs(image, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(run(branch, image).permute(0, 3, 1, 2), expected, atol=1e-5, rtol=1e-4)


def test_convnext_counts_downsampling_as_blocks():
    network = FAMILIES["convnext"]
    assert network.depth == 8 and network.last_blocks() == (0, 3, 5, 7)
    assert network.strides == (4, 8, 8, 8, 16, 16, 32, 32)
    with pytest.raises(ConfigError, match="no attention"):
        BranchConfig(network=network, image_size=64, window_size=7)
    with pytest.raises(ConfigError, match="4 stages"):
        ConvNeXtConfig(depths=(1, 2))


def test_stochastic_depth_grows_over_the_residual_blocks():
    config = BranchConfig(network=FAMILIES["convnext"], image_size=64, drop_path_rate=0.4, drop_path_schedule="linear")
    blocks = [block for stage in build_branch(config).model.stages for block in stage.blocks]
    assert [block.drop_path.drop_prob for block in blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    config = BranchConfig(network=FAMILIES["beit"], image_size=64, window_size=4, drop_path_rate=0.4)
    assert [block.drop_path1.drop_prob for block in build_branch(config).model.blocks] == [0.4, 0.4]


def test_layers_for_learning_rate_decay(randomize):
    layers = {name: build(network, randomize).layer_of for name, network in FAMILIES.items()}
    assert layers["beit"]("model.blocks.1.attn.relative_position_bias_table") == 2
    assert layers["uniperceiver"]("model.frame_embed") == layers["uniperceiver"]("model.norm_pre.weight") == 0
    assert layers["convnext"]("model.stages.0.blocks.0.gamma") is None


def test_six_billion_parameters_on_the_meta_device():
    network = ViTConfig(
        embed_dim=3200, depth=48, num_heads=25, norm="rmsnorm", qk_norm=True, qkv_bias=False, layer_scale=0.1
    )
    with torch.device("meta"):
        branch = build_branch(BranchConfig(network=network, image_size=512))
    assert sum(parameter.numel() for parameter in branch.parameters()) == 5_903_171_200


def test_families_mix_in_one_pyramid(randomize):
    """Four families, interactions spread by themselves, gradients everywhere they are used."""
    networks = [FAMILIES[name] for name in ("rmsnorm", "beit", "uniperceiver", "convnext")]
    branches = tuple(
        BranchConfig(network=network, image_size=size, window_size=4 if network.family == "beit" else None)
        for network, size in zip(networks, (32, 64, 96, 128), strict=True)
    )
    config = PIIPConfig(branches=branches, interaction=InteractionConfig(num_interactions=2, num_heads=4), merging=None)
    assert PIIPConfig.from_dict(config.to_dict()) == config
    model = randomize(PIIP(config))
    maps = model(torch.randn(1, 3, 128, 96))
    assert [m.shape[1:] for m in maps] == [(32, 2, 1), (32, 4, 3), (32, 6, 4), (32, 4, 3)]
    sum(m.square().mean() for m in maps).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_frozen_configurations_compare_by_value():
    assert dataclasses.replace(FAMILIES["convnext"], depths=[1, 2, 1, 1]) == FAMILIES["convnext"]
    assert hash(FAMILIES["beit"]) == hash(dataclasses.replace(FAMILIES["beit"]))
