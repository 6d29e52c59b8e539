"""The zoo against the settings and numbers of the published models (tests/data/zoo_settings.json)."""

import dataclasses
import json
from pathlib import Path

import pytest
import timm

from piip_core import ConfigError, InteractionConfig, ViTConfig, zoo

SETTINGS = json.loads((Path(__file__).parents[1] / "data/zoo_settings.json").read_text())


def test_rows_are_the_published_ones():
    assert set(zoo.names()) == set(SETTINGS)
    assert [entry.name for entry in zoo.entries()] == zoo.names()


@pytest.mark.parametrize("name", SETTINGS)
def test_branches(name):
    config, published = zoo.get(name).config, SETTINGS[name]["branches"]
    assert len(config.branches) == len(published)
    for number, (branch, want) in enumerate(zip(config.branches, published, strict=True), 1):
        assert want["class"] == "vit_models"  # constant drop path, position table without class token
        assert branch.drop_path_schedule == "constant"
        assert branch.network == ViTConfig(
            embed_dim=want["embed_dim"],
            depth=want["depth"],
            num_heads=want["num_heads"],
            mlp_ratio=want["mlp_ratio"],
            patch_size=want["patch_size"],
            qkv_bias=want["qkv_bias"],
            pos_grid=want["pretrain_img_size"] // want["patch_size"],
            layer_scale=want["init_scale"],
            norm_eps=1e-6,
            class_token=False,
        )
        windows = want["windows"] if isinstance(want["windows"], list) else [want["windows"]] * want["depth"]
        assert list(branch.window_sizes) == windows
        assert branch.window_padding == ("before_qkv" if want["flash"] else "after_qkv")
        assert branch.image_size == want["image_size"]
        assert branch.drop_path_rate == want["drop_path_rate"]
        assert [list(pair) for pair in config.segments(number)] == (want["segments"] or [])


@pytest.mark.parametrize("name", SETTINGS)
def test_pretrained_weights_are_the_published_files(name):
    for branch, want in zip(zoo.get(name).config.branches, SETTINGS[name]["branches"], strict=True):
        hub, _, model = branch.pretrained.partition(":")
        assert hub == "timm"
        assert timm.list_pretrained(model) == [model]
        assert timm.models.get_pretrained_cfg(model).url.rpartition("/")[2] == want["pretrained"]


@pytest.mark.parametrize("name", SETTINGS)
def test_interaction_and_merging(name):
    config, want = zoo.get(name).config, SETTINGS[name]["interaction"]
    if want is None:
        assert len(config.branches) == 1 and config.num_interactions == 0
        assert (config.merging.kind, config.merging.pyramid_norm) == ("single", "layer")
    else:
        assert want["attn_type"] == "deform" and want["norm"] == "LayerNorm eps 1e-6"
        assert config.interaction == InteractionConfig(
            num_interactions=want["n_interactions"],
            units="adjacent",
            attention="deformable",
            num_heads=want["deform_num_heads"],
            num_points=want["n_points"],
            value_ratio=want["deform_ratio"],
            projection=want["projection"],
            norm="layernorm",
            ffn=want["with_cffn"],
            ffn_ratio=want["cffn_ratio"],
            drop_path_rate=want["drop_path"],
        )
        assert SETTINGS[name]["fpn"]["kind"] == "simple"
        assert (config.merging.kind, config.merging.pyramid_norm) == ("simple", "group")
    assert config.merging.out_strides == (4, 8, 16, 32)


@pytest.mark.parametrize("name", SETTINGS)
def test_training_facts(name):
    entry, settings = zoo.get(name), SETTINGS[name]
    optimizer, schedule, image = settings["optimizer"], settings["schedule"], settings["image"]
    assert entry.detector == settings["detector"]
    assert [entry.long_side, entry.short_side] == image["scale"]
    assert list(entry.pixel_mean) == image["mean"] and list(entry.pixel_std) == image["std"]
    assert entry.pad_divisor == image["pad_divisor"]
    assert (entry.learning_rate, entry.weight_decay) == (optimizer["lr"], optimizer["weight_decay"])
    decay = optimizer["layer_decay"]
    assert (entry.num_layers, entry.layer_decay) == (decay["num_layers"], decay["layer_decay_rate"])
    assert list(entry.skip_strides) == decay.get("skip_stride", [])
    assert entry.epochs == schedule["max_epochs"] and list(entry.lr_drops) == schedule["lr"]["step"]
    assert (entry.warmup_iters, entry.warmup_factor) == (500, schedule["lr"]["warmup_ratio"])
    assert schedule["lr"]["warmup_iters"] == entry.warmup_iters
    assert settings["config_file"].removesuffix(".py").endswith(f"bs{entry.batch_size}")


@pytest.mark.parametrize("name", SETTINGS)
def test_published_numbers(name):
    entry, readme = zoo.get(name), SETTINGS[name]["published"]["readme"]
    paper = SETTINGS[name]["published"].get("paper", {})
    assert entry.published == zoo.PublishedNumbers(
        box_ap=readme["box_AP"],
        mask_ap=readme["mask_AP"],
        params_m=readme.get("params_M"),
        flops_g=readme.get("flops_G"),
    )
    for ours, printed, papers in (
        (entry.paper.box_ap, readme["box_AP"], paper.get("APb")),
        (entry.paper.mask_ap, readme["mask_AP"], paper.get("APm")),
        (entry.paper.params_m, readme.get("params_M"), paper.get("params_M")),
        (entry.paper.flops_g, readme.get("flops_G"), paper.get("flops_G")),
    ):
        assert ours == (papers if papers != printed else None)


def test_titles_end_with_the_resolution():
    for entry in zoo.entries():
        assert entry.title.endswith(f" {entry.resolution}")


def test_unknown_name_lists_close_matches():
    with pytest.raises(ConfigError, match=r"'piip_tsb_1568_1120'.*piip_tsb_1568_1120_672"):
        zoo.get("piip_tsb_1568_1120")


def test_tsbl_as_released_repeats_the_model_of_branch_3():
    config = zoo.get("piip_tsbl_1344_896_672_448").config
    released = zoo.tsbl_as_released(config)
    assert released.branches[:3] == config.branches[:3]
    assert released.branches[3] == dataclasses.replace(config.branches[2], image_size=1344)
    with pytest.raises(ConfigError, match="expected 4"):
        zoo.tsbl_as_released(zoo.get("piip_tsb_1120_896_448").config)
