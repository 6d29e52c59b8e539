"""What every branch promises, whatever network is inside."""

import dataclasses
import json
import re
from pathlib import Path
from typing import ClassVar
from unittest import mock

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from piip_core import (
    PIIP,
    BranchConfig,
    DensePIIP,
    InteractionConfig,
    MergingConfig,
    PIIPConfig,
    ViTConfig,
    branches,
)
from piip_core.branches import (
    BEiTConfig,
    Branch,
    BranchState,
    ConvNeXtConfig,
    NetworkConfig,
    TimmConfig,
    UniPerceiverConfig,
    build_branch,
    register_branch,
)
from piip_core.branches.base import FAMILIES
from piip_core.errors import ConfigError

SIZES = {"embed_dim": 32, "depth": 3, "num_heads": 4}
NETWORKS = {
    "vit": ViTConfig(**SIZES, pos_grid=4),
    "internvit": ViTConfig(**SIZES, pos_grid=4, qkv_bias=False, norm="rmsnorm", qk_norm=True, activation="gelu_tanh"),
    "beit": BEiTConfig(**SIZES, bias_window=4),
    "uniperceiver": UniPerceiverConfig(**SIZES, pos_grid=4),
    "convnext": ConvNeXtConfig(depths=(1, 1, 2, 1), stage_dims=(8, 16, 24, 32)),
    "timm convnext": TimmConfig(name="convnextv2_atto"),
    "timm rotary": TimmConfig(name="vit_small_patch16_dinov3", options=SIZES),
    "timm naflex": TimmConfig(name="naflexvit_base_patch16_radio_v3", options=SIZES),
}
WINDOWED = [name for name, network in NETWORKS.items() if not network.no_windows]


def branch_of(name, **options):
    return build_branch(BranchConfig(network=NETWORKS[name], image_size=64, **options))


def run_all(branch, image):
    return branch.run(branch.embed(image), 0, branch.num_blocks).tokens


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient(name, randomize):
    branch = randomize(branch_of(name))
    run_all(branch, torch.randn(2, 3, 64, 64)).square().sum().backward()
    dead = [key for key, p in branch.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@pytest.mark.parametrize("name", NETWORKS)
def test_the_last_map_has_the_promised_size(name):
    branch = branch_of(name, **({"window_size": 4} if name == "beit" else {}))
    assert isinstance(branch, Branch) and branch.num_blocks == branch.config.network.depth
    stride = branch.strides[-1]
    tokens = run_all(branch.eval(), torch.randn(2, 3, 96, 64))
    assert tokens.shape == (2, 96 // stride, 64 // stride, branch.dims[-1])


@pytest.mark.parametrize("name", NETWORKS)
def test_segments_one_after_another_are_the_whole_network(name, randomize):
    branch = randomize(branch_of(name)).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        state = branch.embed(image)
        for start, stop in ((0, 1), (1, 1), (1, 3), (3, branch.num_blocks)):
            state = branch.run(state, start, stop)
        torch.testing.assert_close(state.tokens, run_all(branch, image))


@pytest.mark.parametrize("mode", [True, "cheap"])
@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointing_changes_neither_result_nor_gradients(name, mode, randomize):
    branch = randomize(branch_of(name))
    image = torch.randn(1, 3, 64, 64)

    def results(enable):
        branch.zero_grad()
        branch.set_grad_checkpointing(enable)
        tokens = run_all(branch, image)
        tokens.square().sum().backward()
        return [tokens, *(p.grad.clone() for p in branch.parameters())]

    for expected, actual in zip(results(False), results(mode), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_as_large_as_the_map_is_global_attention(name, randomize):
    windowed = randomize(branch_of(name, window_size=4)).eval()
    everywhere = branch_of(name).eval()
    everywhere.load_state_dict(windowed.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(run_all(windowed, image), run_all(everywhere, image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (NETWORKS["convnext"], "no attention"),
        (NETWORKS["timm convnext"], "ConvNeXt"),
        (TimmConfig(name="vit_small_patch16_18x2_224", options={"depth": 2}), "ParallelThingsBlock"),
        (ViTConfig(**SIZES, class_token=True), "class_token"),
    ],
)
def test_windows_that_cannot_be_say_why(network, reason):
    with pytest.raises(ConfigError, match=rf"window_size=7: expected None: .*{reason}"):
        BranchConfig(network=network, image_size=64, window_size=7)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize(("schedule", "rates"), [("constant", [0.2] * 3), ("linear", [0.0, 0.1, 0.2])])
def test_stochastic_depth(name, schedule, rates):
    branch = branch_of(name, drop_path_rate=0.2, drop_path_schedule=schedule)
    for part in ("drop_path1", "drop_path2"):
        assert [getattr(block, part).drop_prob for block in branch.model.blocks] == pytest.approx(rates)


@pytest.mark.parametrize("name", WINDOWED)
def test_depths_for_learning_rate_decay(name):
    branch = branch_of(name)
    layers = {key: branch.layer_of(key) for key, _ in branch.named_parameters()}
    for key, layer in layers.items():
        parts = key.split(".")
        assert layer == (int(parts[2]) + 1 if parts[1] == "blocks" else 0)
    assert set(layers.values()) == {0, 1, 2, 3}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_two_parameters_share_memory(name):
    pointers = [p.data_ptr() for p in branch_of(name).parameters()]
    assert len(set(pointers)) == len(pointers)


def test_families_mix_in_one_pyramid(randomize):
    """Four families, interactions spread by themselves, gradients everywhere they are used."""
    networks = [NETWORKS[name] for name in ("internvit", "beit", "uniperceiver", "convnext")]
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


@pytest.mark.parametrize("attention", ["deformable", "regular"])
@pytest.mark.parametrize("families", [("internvit", "beit"), ("uniperceiver", "vit"), ("beit", "convnext")])
def test_every_layer_is_called(families, attention):
    """Hooks, parametrisations, adapters and replaced forward methods work: no weight is used without its module."""
    windows = [4 if family == "beit" else None for family in families]
    config = PIIPConfig(
        branches=tuple(
            BranchConfig(network=NETWORKS[family], image_size=size, window_size=window)
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


def interaction_gradients(config, frozen, randomize):
    branches = [dataclasses.replace(branch, frozen=frozen) for branch in config.branches]
    torch.manual_seed(0)
    model = randomize(PIIP(dataclasses.replace(config, branches=branches))).train()
    for module in model.interactions.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    sum(m.square().mean() for m in model(torch.ones(1, 3, 64, 64))).backward()
    return model, [parameter.grad for parameter in model.interactions.parameters()]


@pytest.mark.parametrize("families", [("timm rotary", "convnext"), ("internvit", "timm naflex")])
def test_frozen_branches(families, randomize):
    """They stay as they are, and interactions learn through their blocks as if they learned, too."""
    branches = [BranchConfig(network=NETWORKS[family], image_size=64) for family in families]
    config = PIIPConfig(branches=branches, interaction=InteractionConfig(num_interactions=2, num_heads=4), merging=None)
    model, found = interaction_gradients(config, True, randomize)
    _, expected = interaction_gradients(config, False, randomize)
    torch.testing.assert_close(found, expected)
    assert all(parameter.grad is None for parameter in model.branches.parameters())
    assert not any(module.training for module in model.branches.modules() if module is not model.branches)
    assert all(module.training for module in model.interactions.modules())
    for branch, segments in zip(model.branches, model.segments, strict=True):
        state = branch.run(branch.embed(torch.ones(1, 3, 64, 64)), 0, segments[0][1] + 1)
        assert state.tokens.grad_fn is None  # so no activations are kept before the first interaction


def test_frozen_branches_ignore_stochastic_depth():
    branch = branch_of("timm rotary", frozen=True, drop_path_rate=0.9).train()
    image = torch.randn(2, 3, 64, 64)
    assert torch.equal(run_all(branch, image), run_all(branch, image))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pooling(NetworkConfig):
    family = "pooling"
    depth: int = 1
    dims: tuple = (3,)
    strides: tuple = (4,)


class PoolingBranch(Branch):
    def embed(self, image):
        return BranchState(torch.nn.functional.avg_pool2d(image, 4).permute(0, 2, 3, 1))

    def run_block(self, state, index):
        return state

    def layer_of(self, name):
        return None


@mock.patch.dict(FAMILIES)
def test_a_family_of_ones_own_takes_one_call():
    with pytest.raises(ConfigError, match=r"network=Pooling.*ViTConfig.*register_branch"):
        BranchConfig(network=Pooling(), image_size=64)
    register_branch(Pooling)(PoolingBranch)
    pyramid = PIIPConfig(branches=[BranchConfig(network=Pooling(), image_size=64)], merging=None)
    assert PIIPConfig.from_dict(json.loads(json.dumps(pyramid.to_dict()))).to_dict() == pyramid.to_dict()
    (found,) = PIIP(pyramid)(image := torch.rand(1, 3, 64, 32))
    torch.testing.assert_close(found, torch.nn.functional.avg_pool2d(image, 4))


@mock.patch.dict(FAMILIES)
def test_the_adapter_of_the_documents(randomize):
    text = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {name: getattr(branches, name) for name in ("Branch", "BranchState", "NetworkConfig", "register_branch")}
    names |= {"dataclass": dataclasses.dataclass, "ClassVar": ClassVar, "timm": timm, "__name__": "adapter"}
    exec(code, names)
    branch = build_branch(BranchConfig(network=names["ResNetConfig"](), image_size=64)).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(run_all(branch, image).permute(0, 3, 1, 2), branch.model.forward_features(image))


def test_a_family_needs_a_name_of_its_own():
    class Other(NetworkConfig):
        family = "vit"

    with pytest.raises(ConfigError, match=r"Other\.family='vit'"):
        register_branch(Other)
    assert FAMILIES["vit"].config is ViTConfig


def test_subclasses_are_no_part_of_the_family():
    class Wider(ViTConfig):
        pass

    with pytest.raises(ConfigError, match=r"BranchConfig\.network=.*Wider"):
        BranchConfig(network=Wider(**SIZES), image_size=64)
