"""Both counts against published numbers, the public counting script's results, real modules and hand computation."""

import dataclasses
import json
import math
import resource
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from piip_core import (
    PIIP,
    BranchConfig,
    ConfigError,
    DensePIIP,
    InteractionConfig,
    MergingConfig,
    PIIPConfig,
    TimmConfig,
    ViTConfig,
    zoo,
)
from piip_core.branches import BEiTConfig, ConvNeXtConfig, UniPerceiverConfig, build_branch
from piip_core.checkpoints import model_shapes
from piip_core.merging import ClassificationMerging
from piip_core.meta import on_meta
from piip_core.ops import MSDeformAttn, make_reference_points
from piip_tools.flops.executed import analyze_backbone, analyze_model, executed_count, padded_size
from piip_tools.flops.published import Count, published_count, published_rule
from piip_tools.flops.tables import analyze_zoo

SETTINGS = json.loads((Path(__file__).parents[1] / "data/zoo_settings.json").read_text())


def giga(config: PIIPConfig) -> float:
    return published_count(config).total.macs / 1e9


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", [name for name, settings in SETTINGS.items() if settings["counts"]])
def test_published_count_is_the_counting_scripts(name):
    config, want = zoo.get(name).config, SETTINGS[name]["counts"]
    total = published_count(config).total
    assert round((total.macs + padding_work(name, config)) / 1e9, 2) == want["flops_G"]
    assert round((total.params + dead_parameters(name, config)) / 1e6, 2) == want["params_M"]


def dead_parameters(name: str, config: PIIPConfig) -> int:
    """What the public classes have and never use: a norm behind ConvNeXt, position entries of class tokens."""
    dead = 0
    for branch, want in zip(config.branches, SETTINGS[name]["branches"], strict=True):
        width = branch.network.dims[-1]
        dead += {"ConvNextHFWrapper": 2 * width, "InternViT6B": width}.get(want["class"], 0)
    return dead


def padding_work(name: str, config: PIIPConfig) -> int:
    """The script projects padded window positions of one class, which no printed number shows."""
    work = 0
    for branch, want in zip(config.branches, SETTINGS[name]["branches"], strict=True):
        window, side = branch.window_sizes[0], branch.image_size // 16
        if want["class"] == "InternViT6B" and window is not None:
            padded = (math.ceil(side / window) * window) ** 2
            work += (padded - side**2) * 3 * branch.network.embed_dim**2 * branch.network.depth
    return work


def printed_rows(kind):
    """Rows for which a table prints #Param ("params_m") or #FLOPs ("flops_g"), with the number."""
    for entry in zoo.entries():
        printed = getattr(entry.published, kind) or getattr(entry.paper, kind)
        if printed is not None:
            yield pytest.param(entry, printed, id=entry.name)


@pytest.mark.parametrize(("entry", "printed"), list(printed_rows("params_m")))
def test_published_count_reproduces_printed_parameters(entry, printed):
    counted = published_count(entry.config).total.params / 1e6
    assert abs(counted - printed) < max(0.5, 0.003 * printed)  # printed as whole numbers: half a unit is rounding


def unprinted_work(entry):
    """What the printed #FLOPs lack, by the notes of the rows."""
    last = entry.config.branches[-1]
    tokens, width = (last.image_size // 16) ** 2, last.network.dims[-1]
    if entry.name.startswith("piip_lh6b"):
        return 10 * width**2 * last.network.depth * tokens
    if entry.name in ("vit_b_640_upernet", "vit_l_640_upernet"):
        return tokens * 3 * 16**2 * width
    return 0


@pytest.mark.parametrize(("entry", "printed"), list(printed_rows("flops_g")))
def test_published_count_reproduces_printed_flops(entry, printed):
    counted = published_count(entry.config).total.macs / 1e9
    counted -= unprinted_work(entry) / 1e9
    assert abs(counted - printed) < max(0.5, 0.003 * printed)


def test_the_papers_internvit_has_windows():
    config = zoo.get("internvit_6b_1024").config
    windowed = dataclasses.replace(config, branches=(dataclasses.replace(config.branches[0], window_size=14),))
    assert giga(windowed) == pytest.approx(zoo.get("internvit_6b_1024").paper.flops_g, rel=0.003)


@pytest.mark.parametrize("name", [entry.name for entry in zoo.entries() if published_rule(entry.config) == "merging"])
def test_the_merging_rule_counts_the_parameters_of_the_dense_model(name):
    config = zoo.get(name).config
    assert published_count(config).total.params == sum(math.prod(s) for s in model_shapes(config).values())


@pytest.mark.parametrize(
    "network",
    [
        ViTConfig(embed_dim=32, depth=2, num_heads=4, pos_grid=4, norm="rmsnorm", qk_norm=True, qkv_bias=False),
        BEiTConfig(embed_dim=32, depth=2, num_heads=4, bias_window=4),
        UniPerceiverConfig(embed_dim=32, depth=2, num_heads=4, pos_grid=4),
        ConvNeXtConfig(depths=(1, 2, 1, 1), stage_dims=(8, 16, 24, 32)),
    ],
    ids=lambda network: network.family,
)
def test_published_parameters_of_every_family(network):
    window = 4 if network.family == "beit" else None
    branch = BranchConfig(network=network, image_size=64, window_size=window)
    config = PIIPConfig(branches=(branch,), merging=None)
    assert published_count(config).branches[0].params == parameters(build_branch(branch))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"units": "cycle_up"},
        {"attention": "regular", "num_heads": 8},
        {"projection": False, "norm": "none"},
        {"ffn": False, "num_points": 3, "value_ratio": 1.0},
    ],
)
def test_published_parameters_are_those_of_the_modules(tiny_config, options):
    config = tiny_config(interaction=InteractionConfig(num_interactions=3, **{"num_heads": 4} | options))
    model, count = PIIP(config), published_count(config)
    assert count.interactions.params == parameters(model.interactions)
    assert count.head.params == parameters(ClassificationMerging(model.dims, 1000, num_groups=8))
    for branch, want in zip(config.branches, count.branches, strict=True):
        grid = dataclasses.replace(branch.network, pos_grid=branch.image_size // 16)  # table of the real grid
        assert want.params == parameters(build_branch(dataclasses.replace(branch, network=grid)))


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "naflexvit_base_patch16_siglip", "convnext_atto"])
def test_networks_of_timm_count_as_executed(name):
    network = TimmConfig(name=name)
    windows = None if name.startswith("convnext") else (3, None) * (network.depth // 2)
    branch = BranchConfig(network=network, image_size=128, window_size=windows)
    executed = analyze_backbone(PIIPConfig(branches=(branch,), merging=None)).modules[0]
    (counted,) = published_count(PIIPConfig(branches=(branch,))).branches
    assert (counted.params, counted.macs) == (executed.params, executed.flops)


@pytest.mark.parametrize("name", ["vit_b_1024", "piip_tsb_1568_1120_672", "piip_sbl_1120_672_448"])
def test_backbone_parameters_by_part(name):
    with on_meta():
        model = DensePIIP(zoo.get(name).config)
    want = SETTINGS[name]["backbone_params_M"]
    parts = {f"branch{i}": branch for i, branch in enumerate(model.pyramid.branches, 1)}
    parts |= {"interactions": model.pyramid.interactions, "fpn": model.feature_pyramid, "total": model}
    parts |= {"merge": model.merging or nn.Identity()}
    for part, millions in want.items():
        assert round(parameters(parts[part]) / 1e6, 3) == millions, part


def test_tsbl_parameters_as_released():
    name = "piip_tsbl_1344_896_672_448"
    with on_meta():
        model = DensePIIP(zoo.tsbl_as_released(zoo.get(name).config))
    assert round(parameters(model) / 1e6, 3) == SETTINGS[name]["backbone_params_M"]["total"]


def test_executed_count_of_piip_tsb():
    """Counted on the public code: 572 G without and 708 G with the pyramid, norms and biases included."""
    report = analyze_backbone(zoo.get("piip_tsb_1568_1120_672").config)
    parts = {row.name: row for row in report.modules}
    assert report.input_size == (1568, 1568)
    assert report.flops == pytest.approx(708e9, rel=0.004)
    assert report.flops - parts["feature_pyramid"].flops == pytest.approx(572e9, rel=0.004)
    assert report.params == round(175.043715e6)
    for field in ("params", "flops", "params_published_count", "flops_published_count"):
        assert sum(getattr(row, field) or 0 for row in report.modules) == getattr(report, field)


def test_executed_count_of_a_branch_by_hand(tiny_branch):
    """Windows of 3 on a 5 x 4 map: projections of the attention run on 6 x 6 tokens, the rest on 20."""
    branch = build_branch(tiny_branch(32, 80, depth=2, window_size=(3, None)))
    calls = nn.Module()
    calls.branch = branch
    calls.forward = lambda image: branch.run(branch.embed(image), 0, 2)
    counts = executed_count(calls, torch.zeros(2, 3, 80, 64))
    mlp, qkv_and_proj = 2 * 4 * 32 * 32, 4 * 32 * 32
    windowed = 36 * qkv_and_proj + 2 * 36 * 9 * 32 + 20 * mlp
    everywhere = 20 * qkv_and_proj + 2 * 20 * 20 * 32 + 20 * mlp
    assert counts.below("branch.model.patch_embed").macs == 2 * 20 * 16 * 16 * 3 * 32
    assert counts.below("branch.model.blocks.0").macs == 2 * windowed
    assert counts.below("branch.model.blocks.1").macs == 2 * everywhere
    assert counts.below("branch.model.blocks.1.mlp").macs == 2 * 20 * mlp
    assert counts.total == Count(parameters(branch), counts.below("branch").macs)


def test_executed_count_of_deformable_attention_by_hand():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = MSDeformAttn(32, num_heads=4, num_levels=2, num_points=3, value_ratio=0.5, value_dim=24)

        def forward(self, query, value):
            return self.attention(query, make_reference_points(5, 7), value, [(6, 4), (3, 2)])

    counts = executed_count(Attend(), torch.zeros(2, 35, 32), torch.zeros(2, 30, 24))
    samples = 4 * 2 * 3
    linears = 30 * 24 * 16 + 35 * 32 * 3 * samples + 35 * 16 * 32
    assert counts.total.macs == 2 * (linears + 5 * 35 * samples * 4)


class Attends(nn.Module):
    """Attention of 10 queries of width 8 with 14 keys of width 8; 4 heads in a batch of 2."""

    def __init__(self, key_heads=4, value_width=6, **options):
        super().__init__()
        self.key_heads, self.value_width, self.options = key_heads, value_width, options
        self.macs = 2 * 4 * 10 * 14 * (8 + value_width)

    def forward(self, like):
        query = like.new_zeros(2, 4, 10, 8)
        key = like.new_zeros(2, self.key_heads, 14, 8)
        value = like.new_zeros(2, self.key_heads, 14, self.value_width)
        options = {name: option(like) if callable(option) else option for name, option in self.options.items()}
        return F.scaled_dot_product_attention(query, key=key, value=value, **options)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "module",
    [
        Attends(),
        Attends(attn_mask=lambda like: like.new_zeros(10, 14)),
        Attends(attn_mask=lambda like: like.new_ones(2, 4, 10, 14, dtype=torch.bool)),
        Attends(is_causal=True),
        Attends(key_heads=2, enable_gqa=True),
        Attends(value_width=8),
        Attends(value_width=8, is_causal=True),
    ],
)
def test_attention_is_counted_from_its_shapes(module, device):
    assert executed_count(module, torch.zeros(1, device=device)).total.macs == module.macs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("autocast", [False, True])
def test_every_attention_kernel_counts_the_same(backend, dtype, autocast):
    module = Attends(value_width=8)  # the fused kernels want keys and values of one width
    with sdpa_kernel(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert executed_count(module, torch.zeros(1, dtype=dtype)).total.macs == module.macs


@pytest.mark.parametrize("fused", [True, False])
def test_attention_in_parts_counts_as_much_as_fused(fused):
    """timm's layers have both; in parts it is two plain products."""
    attention = timm.layers.Attention(24, num_heads=3)
    attention.fused_attn = fused
    counts = executed_count(attention, torch.zeros(2, 10, 24))
    assert counts.total.macs == 2 * (10 * 4 * 24 * 24 + 2 * 10 * 10 * 24)


@pytest.mark.parametrize("training", [True, False])
def test_attention_of_multihead_attention_is_counted(training):
    class SelfAttention(nn.MultiheadAttention):
        def forward(self, tokens):
            return super().forward(tokens, tokens, tokens, need_weights=False)[0]

    counts = executed_count(SelfAttention(24, 3, batch_first=True).train(training), torch.zeros(2, 10, 24))
    assert counts.total.macs == 2 * (10 * 4 * 24 * 24 + 2 * 10 * 10 * 24)


def test_executed_count_is_the_same_on_the_meta_device(tiny_config):
    config = tiny_config(window_size=3)
    model, image = DensePIIP(config), torch.zeros(1, 3, 96, 144)
    with on_meta():
        without_data = executed_count(DensePIIP(config), torch.empty(1, 3, 96, 144))
    assert executed_count(model, image) == without_data
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_model_inside_a_detector(tiny_config):
    """Rows add up, and only what takes the image is run."""
    config = tiny_config(merging=MergingConfig())

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.bottom_up = DensePIIP(config)
            self.lateral = nn.Conv2d(32, 8, 1)

        def forward(self, image):
            return [self.lateral(level) for level in self.bottom_up(image)]

    detector = nn.Module()
    detector.backbone, detector.head = Backbone(), nn.Linear(8, 5)
    report, alone = analyze_model(detector, backbone="backbone"), analyze_backbone(config)
    rows = {row.name: row for row in report.modules}
    levels = 32 * 32 + 16 * 16 + 8 * 8 + 4 * 4
    assert rows["backbone.lateral"].flops == levels * 32 * 8
    assert (rows["head"].params, rows["head"].flops) == (8 * 5 + 5, None)
    assert report.flops == alone.flops + levels * 32 * 8
    assert report.params == parameters(detector)
    assert report.flops_published_count == alone.flops_published_count
    assert sum(row.params or 0 for row in report.modules) == report.params
    assert sum(row.flops or 0 for row in report.modules) == report.flops


def test_model_without_pyramid_is_refused():
    with pytest.raises(ConfigError, match="Linear holds 0 PIIP"):
        analyze_model(nn.Linear(2, 2))


def test_six_billion_parameters_need_no_memory():
    network = ViTConfig(embed_dim=3200, depth=48, num_heads=25)
    branches = (
        BranchConfig(network=network, image_size=512),
        BranchConfig(network=zoo.VIT["B"], image_size=1024),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = analyze_backbone(PIIPConfig(branches=branches), (768, 1024))
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert report.params > 6e9 and report.input_size == (768, 1024)
    assert grown_kib < 500 * 1024


def test_rows_of_the_zoo_are_both_counts(tiny_config):
    entry = dataclasses.replace(zoo.get("piip_tsb_1120_896_448"), config=tiny_config())
    (row,) = analyze_zoo([entry])
    counted, executed = published_count(entry.config).total, analyze_backbone(entry.config)
    assert row.published_count == counted and row.executed == Count(executed.params, executed.flops)


def test_padded_size():
    assert padded_size(941, 1568, 224) == (1120, 1568)
