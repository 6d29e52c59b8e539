"""Multimodal rows against the settings, numbers and counts of the published models (multimodal_settings.json)."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import timm
import torch

from piip_core import PIIP, InteractionConfig, zoo
from piip_core.branches import ConvNeXtConfig, ViTConfig
from piip_core.merging import TokenMerging
from piip_core.meta import on_meta
from piip_tools.flops.published import published_count
from piip_tools.flops.tables import analyze_multimodal, multimodal_table

SETTINGS = json.loads((Path(__file__).parents[1] / "data/multimodal_settings.json").read_text())
PIIP_ROWS = [name for name, settings in SETTINGS.items() if "backbone" in settings]
BASELINES = ["llava_1_5_7b", "llava_1_5_13b"]
LLMS = {"Vicuna-7B": ("lmsys/vicuna-7b-v1.5", 4096), "Vicuna-13B": ("lmsys/vicuna-13b-v1.5", 5120)}
# The public names, two of them of weights resized offline to patches of 16 pixels
WEIGHTS = {
    "openai/clip-vit-base-patch16": "open_clip:ViT-B-16-quickgelu/openai",
    "OpenGVLab/clip-vit-large-patch14to16-224": "open_clip:ViT-L-14-quickgelu/openai",
    "OpenGVLab/clip-vit-large-patch14to16-336": "open_clip:ViT-L-14-336-quickgelu/openai",
}
SCORES = ("MMB_EN", "MMVet", "TextVQA", "SQA_I", "GQA", "VQAv2", "SEED_I", "POPE", "Avg")


COUNTED = (
    "llava_1_5_7b",
    "piip_llava_clip_bl_512_256_7b",
    "piip_llava_convnext_b_clip_l_640_224_7b",
    "piip_llava_convnext_b_clip_l_1024_336_13b",
)


@pytest.fixture(scope="module")
def rows():
    """Rows of every kind; tools/generate_tables.py counts them all."""
    return {row.entry.name: row for row in analyze_multimodal(map(zoo.multimodal, COUNTED))}


@functools.cache
def meta_pyramid(config) -> PIIP:
    """Without memory; language models of several sizes share one."""
    with on_meta():
        return PIIP(config)


def meta_projector(entry) -> TokenMerging:
    with on_meta():
        return TokenMerging(entry.vision.dims_after(None), entry.embed_dim, norm=entry.projector_norm)


def parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def millions(number) -> float:
    return round(number / 1e6, 2)


def test_rows_are_the_published_ones():
    assert [entry.name for entry in zoo.multimodal_entries()] == list(SETTINGS)
    assert all(zoo.multimodal(name).name == name for name in SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_printed_numbers(name):
    entry, want = zoo.multimodal(name), SETTINGS[name]
    assert dataclasses.astuple(entry.scores) == tuple(want["published"][key] for key in SCORES)
    assert sum(dataclasses.astuple(entry.scores)[:8]) / 8 == pytest.approx(
        entry.scores.average, abs=0.1
    )  # rounded or cut
    assert entry.flops_g == want["published"]["flops_G"]
    assert (entry.resolution, entry.training_data) == (want["resolution"], want["data"])
    assert (entry.language_model, entry.embed_dim) == LLMS[want["llm"]]
    assert bool(entry.note) == bool(want["disagreements"])


@pytest.mark.parametrize("name", PIIP_ROWS)
def test_branches_and_interactions(name):
    entry, want = zoo.multimodal(name), SETTINGS[name]
    config, public = entry.vision, want["backbone"]
    for number, branch in enumerate(config.branches, 1):
        settings = public[f"branch{number}"]
        assert branch.image_size == settings["img_size"]
        assert [list(pair) for pair in config.segments(number)] == settings["interaction_indexes"]
        assert (branch.drop_path_rate, branch.window_size) == (0.0, None)
        if settings["model_type"] == "convnext_timm":
            assert isinstance(branch.network, ConvNeXtConfig)
            assert list(branch.network.strides) == settings["downsample_ratios"]
            assert branch.pretrained == f"timm:{settings['pretrained']}"
        else:
            assert branch.network.patch_size == settings["patch_size"]
            assert branch.network.class_token is settings["use_cls_token"] is True
            assert branch.pretrained == WEIGHTS[settings["pretrained"]]
    assert config.interaction == InteractionConfig(
        num_interactions=want["recomputed"]["n_interactions"],
        attention="deformable",
        num_heads=public["deform_num_heads"],
        num_points=public["n_points"],
        value_ratio=public["deform_ratio"],
        ffn=public["with_cffn"],
        ffn_ratio=public["cffn_ratio"],
        drop_path_rate=public["interaction_drop_path_rate"],
    )
    assert (config.merging, entry.feature_block) == (None, None)
    projector = want["projector"]
    assert [projector["dim1"], projector["dim2"]] == list(config.dims_after(None))
    assert (projector["norm"], entry.projector_norm) == ("gn", "group")


def test_clip_networks():
    """OpenAI's sizes; a table for 14 x 14 or 21 x 21 patches of 16 pixels."""
    base, small, large = (
        zoo.multimodal(name).vision.branches[index].network
        for name, index in (
            ("piip_llava_clip_bl_512_256_7b", 1),
            ("piip_llava_clip_bl_512_256_7b", 0),
            ("piip_llava_clip_bl_512_448_7b", 0),
        )
    )
    options = dict(
        norm_eps=1e-5, layer_scale=None, activation="quick_gelu", pre_norm=True, class_token=True, class_position=True
    )
    assert base == ViTConfig(embed_dim=768, depth=12, num_heads=12, pos_grid=14, **options)
    assert small == ViTConfig(embed_dim=1024, depth=24, num_heads=16, pos_grid=14, **options)
    assert large == dataclasses.replace(small, pos_grid=21)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines(name):
    entry = zoo.multimodal(name)
    (branch,) = entry.vision.branches
    assert (branch.network.patch_size, branch.network.pos_grid, branch.image_size) == (14, 24, 336)
    assert branch.pretrained == "open_clip:ViT-L-14-336-quickgelu/openai"
    assert (entry.feature_block, entry.projector_norm, entry.image_seq_length) == (22, "none", 576)
    assert entry.vision.num_interactions == 0


def test_pretrained_weights_exist():
    open_clip = pytest.importorskip("open_clip")
    for entry in zoo.multimodal_entries():
        for branch in entry.vision.branches:
            library, _, name = branch.pretrained.partition(":")
            if library == "timm":
                assert timm.list_pretrained(name) == [name]
            else:
                assert tuple(name.split("/")) in open_clip.list_pretrained()


@pytest.mark.parametrize("name", PIIP_ROWS)
def test_published_count_is_the_recomputed_one(name):
    count = published_count(zoo.multimodal(name).vision, rule="vision tower")
    want = SETTINGS[name]["recomputed"]
    assert round(count.total.macs / 1e9, 2) == want["flops_G"]
    assert (count.head.params, count.head.macs) == (0, 0)
    assert millions(count.interactions.params) == want["params_M"]["interactions"]


@pytest.mark.parametrize("name", SETTINGS)
def test_printed_flops(name):
    entry = zoo.multimodal(name)
    deviation = published_count(entry.vision, rule="vision tower").total.macs / 1e9 / entry.flops_g - 1
    if any("FLOPs" in text for text in SETTINGS[name]["disagreements"]):
        assert deviation > 0.1 and "12 interactions" in entry.note  # counted on the 7B model
        assert entry.flops_g == zoo.multimodal(name.replace("_13b", "_7b")).flops_g
    else:
        assert abs(deviation) < 0.003


@pytest.mark.parametrize("name", PIIP_ROWS)
def test_modules_have_the_published_parameters(name):
    """The public classes also keep norms and heads that no feature depends on."""
    want = SETTINGS[name]["recomputed"]["params_M"]
    config = zoo.multimodal(name).vision
    pyramid = meta_pyramid(config)
    counted = published_count(config, rule="vision tower")
    for number, branch in enumerate(pyramid.branches, 1):
        width = config.branches[number - 1].network.dims[-1]
        unused = 2 * width  # final norm
        if config.branches[number - 1].network == zoo.networks.CONVNEXT["L"]:
            unused += width * width + width  # linear of the head with an MLP
        assert millions(parameters(branch) + unused) == want[f"branch{number}"]
        assert counted.branches[number - 1].params == parameters(branch)
    assert parameters(pyramid.interactions) == counted.interactions.params
    assert millions(parameters(meta_projector(zoo.multimodal(name)))) == want["projector"]


@pytest.mark.parametrize("name", SETTINGS)
def test_shapes(name):
    entry = zoo.multimodal(name)
    pyramid = meta_pyramid(entry.vision)
    image = torch.empty(1, 3, entry.image_size, entry.image_size, device="meta")
    if entry.feature_block is None:
        maps = pyramid(image)
        want = SETTINGS[name]["recomputed"]
        assert [list(x.shape) for x in maps] == want["branch_feature_maps"]
        assert entry.image_seq_length == want["llm_tokens"] and entry.image_size == want["input_size"]
    else:
        maps = pyramid.forward_blocks(image, [entry.feature_block])
    assert meta_projector(entry)(maps).shape == (1, entry.image_seq_length, entry.embed_dim)


def test_executed_count_of_the_baseline_by_hand(rows):
    """23 of 24 blocks on 577 tokens, two linears on 576; the rule counts 24 blocks and attention among patches."""
    row, width, patches = rows["llava_1_5_7b"], 1024, 24 * 24
    block = 12 * width**2 * (patches + 1)
    embedding = patches * 14 * 14 * 3 * width
    assert row.backbone.macs == embedding + 23 * (block + 2 * (patches + 1) ** 2 * width)
    assert row.projector.macs == patches * (width * 4096 + 4096 * 4096)
    norms = 2 * (patches + 1) * width * (2 * 24 + 1)
    assert row.published_count.macs == embedding + 24 * (block + 2 * patches**2 * width) + norms
    assert row.executed.macs == row.backbone.macs + row.projector.macs


def test_executed_count_is_near_the_published_one(rows):
    """They differ by norms, by the class tokens in the attention, and by the grids on which ConvNeXt is sampled."""
    for row in (rows[name] for name in COUNTED[1:]):
        assert row.backbone.macs == pytest.approx(row.published_count.macs, rel=0.025)
        config, width, tokens = row.entry.vision, row.entry.embed_dim, row.entry.image_seq_length
        dims, strides = config.dims_after(None), config.strides_after(None)
        expected = 0
        for branch, dim, stride in zip(config.branches, dims, strides, strict=True):
            cells = (branch.image_size // stride) ** 2  # a map that grows is resized behind the first linear
            expected += min(cells, tokens) * dim * width + tokens * width**2
        assert row.projector.macs == expected


def test_sampling_of_convnext_is_counted_on_the_first_grid():
    """In the published rule only: stride 8 behind the first of two interactions, 16 or 32 behind the second."""
    entry = zoo.multimodal("piip_llava_convnext_b_clip_l_640_224_7b")
    towers = published_count(entry.vision, rule="vision tower").interactions.macs
    each = published_count(entry.vision, rule="classifier").interactions.macs
    first, second = entry.vision.strides_after(0)[1], entry.vision.strides_after(1)[1]
    width = entry.vision.dims_after(1)[1]
    assert towers - each == 5 * 4 * width * ((640 // first) ** 2 - (640 // second) ** 2) > 0


def test_table(rows):
    lines = multimodal_table(rows.values()).splitlines()
    header, _, *body = (line for line in lines if line.startswith("|"))
    cells = [dict(zip(split(header), split(line), strict=True)) for line in body]
    assert [cell["name"].strip("`") for cell in cells] == list(COUNTED)
    last = cells[-1]
    assert last["model"] == "PIIP-LLaVA ConvNeXt-B CLIP-L [1]" and last["language model"] == "vicuna-13b-v1.5"
    assert (last["#FLOPs"], last["our #FLOPs count"], last["our executed FLOPs"]) == ("598G", "732.0G", "777.2G")
    assert (last["MMBench"], last["average"], last["image tokens"]) == ("68.5", "68.0", "1024")
    assert lines[-1].strip() == f"[1] {zoo.multimodal(COUNTED[-1]).note}."


def split(line):
    return [cell.strip() for cell in line.strip("|").split("|")]
