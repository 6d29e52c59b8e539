"""Several branch families together; each by itself is in branches/."""

import dataclasses

import pytest
import torch
from torch import nn

from piip_core import (
    PIIP,
    BranchConfig,
    ConfigError,
    DensePIIP,
    InteractionConfig,
    MergingConfig,
    PIIPConfig,
    ViTConfig,
)
from piip_core.branches import BEiTConfig, ConvNeXtConfig, NetworkConfig, UniPerceiverConfig, build_branch
from piip_core.checkpoints.branch_names import BRANCH_CLASSES
from piip_core.checkpoints.rules import RuleTable

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


@torch.no_grad()
def test_convnext_equals_that_of_transformers(randomize):
    transformers = pytest.importorskip("transformers")
    branch = build(FAMILIES["convnext"], randomize)
    config = transformers.ConvNextConfig(depths=[1, 2, 1, 1], hidden_sizes=[8, 16, 24, 32])
    theirs = transformers.ConvNextModel(config).eval()
    table = RuleTable(BRANCH_CLASSES["convnext"])
    state = {
        table.to_published(name)[0][0].removeprefix("convnext_model."): tensor
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


def test_layers_for_learning_rate_decay(randomize):
    layers = {name: build(network, randomize).layer_of for name, network in FAMILIES.items()}
    assert layers["beit"]("model.blocks.1.attn.relative_position_bias_table") == 2
    assert layers["uniperceiver"]("model.frame_embed") == layers["uniperceiver"]("model.norm_pre.weight") == 0
    assert layers["convnext"]("model.stages.0.blocks.0.gamma") is None


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


@pytest.mark.parametrize("attention", ["deformable", "regular"])
@pytest.mark.parametrize("families", [("rmsnorm", "beit"), ("uniperceiver", "tanh"), ("beit", "convnext")])
def test_every_layer_is_called(families, attention):
    """Hooks, parametrisations, adapters and replaced forward methods work: no weight is used without its module."""
    windows = [4 if family == "beit" else None for family in families]
    config = PIIPConfig(
        branches=tuple(
            BranchConfig(network=FAMILIES[family], image_size=size, window_size=window)
            for family, size, window in zip(families, (64, 96), windows, strict=True)
        ),
        interaction=InteractionConfig(num_interactions=2, num_heads=4, attention=attention),
        merging=MergingConfig(out_strides=(8, 16, 32), num_groups=4),
    )
    model, called = DensePIIP(config), set()
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, _: called.add(module))
    try:
        model(torch.randn(1, 3, 96, 96))
    finally:
        hook.remove()
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.LayerNorm, nn.GroupNorm)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    assert [name for name, module in layers.items() if module not in called] == []
