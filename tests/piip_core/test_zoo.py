"""The zoo against the settings and numbers of the published models (tests/data/zoo_settings.json)."""

import dataclasses
import json
from pathlib import Path

import pytest
import timm

from piip_core import ConfigError, InteractionConfig, zoo
from piip_core.branches import BEiTConfig, ConvNeXtConfig, UniPerceiverConfig, ViTConfig

SETTINGS = json.loads((Path(__file__).parents[1] / "data/zoo_settings.json").read_text())


# The paper prints these, without settings: box and mask AP, #Param and #FLOPs
PAPER_ONLY = {
    "piip_lh6b_1280_1024_256": (53.5, 47.5, 7269, 5643),
    "piip_lh6b_1280_1024_512": (54.4, 47.8, 7271, 10368),
    "piip_lh6b_1280_1024_640": (55.7, 49.0, 7273, 13911),
    "piip_tsb_1568_1120_672_cascade_1x": (None, None, None, None),
    "piip_sbl_1568_1120_672_cascade_1x": (53.6, 46.3, None, None),
    "piip_tsb_1568_1120_672_cascade_3x_ms": (53.1, 46.5, None, None),
    "piip_sbl_1568_1120_672_cascade_3x_ms": (54.5, 47.7, None, None),
    "vit_b_640_upernet": (None, None, None, 159),
    "piip_tsb_896_448_336_upernet": (None, None, None, 118),
    "vit_l_640_upernet": (None, None, None, 545),
    "piip_sbl_1120_448_336_upernet": (None, None, None, 456),
    "internvit_6b_windows_512_upernet": (None, None, None, 6105),
    "piip_lh6b_640_512_192_upernet": (None, None, None, 1903),
    "piip_lh6b_640_512_256_upernet": (None, None, None, 2592),
    "piip_lh6b_640_512_384_upernet": (None, None, None, 4560),
}
DETECTORS = {"mask_rcnn": "Mask R-CNN", "dino": "DINO", "upernet": "UperNet"}
SEGMENTATION = [name for name, row in SETTINGS.items() if row["detector"] == "UperNet"]
ACTIVATIONS = {None: "gelu", "fused_mlp": "gelu_tanh"}
# timm has no weights of these names; the rest of the names differ between the projects
LOCAL_FILES = {"intern_vit_6b_224px.pth"}
RENAMED = {
    "mae_pretrain_vit_large.pth": "vit_large_patch16_224.mae",
    "mae_pretrain_vit_base.pth": "vit_base_patch16_224.mae",
    "mae_pretrain_vit_huge.pth": "vit_huge_patch14_224.mae",
    "convnext-base-224": "convnext_base.fb_in1k",
    "convnext-small-224": "convnext_small.fb_in1k",
    "convnext-tiny-224": "convnext_tiny.fb_in1k",
}


def test_rows_are_the_published_ones():
    assert set(zoo.names()) == {*SETTINGS, *PAPER_ONLY}
    assert [entry.name for entry in zoo.entries()] == zoo.names()
    assert len({entry.config_name for entry in zoo.entries()}) == len(zoo.names())


def recorded_network(want, *, own_grid=False):
    """Our configuration of the public branch class, from its recorded settings.

    The public segmentation classes keep a position table for the branch's own image size (`own_grid`).
    """
    if want["class"] == "ConvNextHFWrapper":
        return ConvNeXtConfig(depths=want["stage_depths"], stage_dims=want["stage_dims"])
    sizes = {key: want[key] for key in ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size")}
    grid = want["image_size" if own_grid else "pretrain_img_size"] // want["patch_size"]
    if want["class"] == "BEiT":
        return BEiTConfig(**sizes, layer_scale=want["init_values"], bias_window=want["windows"])
    if want["class"] == "UnifiedBertEncoder":
        return UniPerceiverConfig(**sizes, pos_grid=grid)
    if want["class"] == "vit_models":
        activation = ACTIVATIONS[want.get("Mlp_block")]
        return ViTConfig(**sizes, pos_grid=grid, layer_scale=want["init_scale"], activation=activation)
    return ViTConfig(
        **sizes,
        pos_grid=grid,
        qkv_bias=want["qkv_bias"],
        layer_scale=want["init_values"],
        norm={"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}[want["norm_layer_type"]],
        qk_norm=want["qk_normalization"],
        activation=ACTIVATIONS[want.get("mlp_type")],
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_branches(name):
    config, published = zoo.get(name).config, SETTINGS[name]["branches"]
    assert len(config.branches) == len(published)
    for number, (branch, want) in enumerate(zip(config.branches, published, strict=True), 1):
        assert branch.network == recorded_network(want, own_grid=name in SEGMENTATION)
        assert branch.drop_path_schedule == ("constant" if want["class"] == "vit_models" else "linear")
        depth = branch.network.depth
        windows = want["windows"] if isinstance(want["windows"], list) else [want["windows"]] * depth
        assert list(branch.window_sizes) == windows
        flash = want["flash"] is not False  # classes without the setting pad like flash attention
        assert branch.window_padding == ("before_qkv" if flash else "after_qkv")
        assert branch.image_size == want["image_size"]
        assert branch.drop_path_rate == (want["drop_path_rate"] or 0.0)
        assert [list(pair) for pair in config.segments(number)] == (want["segments"] or [])


@pytest.mark.parametrize("name", SETTINGS)
def test_pretrained_weights_are_the_published_files(name):
    for branch, want in zip(zoo.get(name).config.branches, SETTINGS[name]["branches"], strict=True):
        public = want["pretrained"]
        hub, _, model = branch.pretrained.partition(":")
        if hub != "timm":
            assert branch.pretrained == f"weights/{public}"
            assert public in LOCAL_FILES or public.startswith("uni-perceiver")
            continue
        assert timm.list_pretrained(model) == [model]
        config = timm.models.get_pretrained_cfg(model)
        if public in RENAMED:
            assert model == RENAMED[public]
        elif config.url:
            # AugReg was converted from .npz
            assert config.url.rpartition("/")[2].removesuffix(".npz") == public.removesuffix(".pth") or (
                config.url.rpartition("/")[2] == public
            )
        else:  # published by timm alone: BEiTv2
            assert config.hf_hub_id and public.startswith("beitv2") and model.startswith("beitv2")


@pytest.mark.parametrize("name", SETTINGS)
def test_interaction_and_merging(name):
    config, want = zoo.get(name).config, SETTINGS[name]["interaction"]
    fpn = SETTINGS[name]["fpn"]
    assert config.merging.out_strides == ((8, 16, 32) if fpn.get("is_dino") else (4, 8, 16, 32))
    if want is None:
        assert len(config.branches) == 1 and config.num_interactions == 0 and config.merging.kind == "single"
        if fpn.get("with_simple_fpn", True):
            assert (config.merging.pyramid_norm, config.merging.out_blocks) == ("layer", None)
        else:
            assert config.merging.out_blocks == (2, 6, 34, 38)
        return
    assert want["attn_type"] == "deform"
    assert config.interaction == InteractionConfig(
        num_interactions=want["n_interactions"],
        units="adjacent",
        attention="deformable",
        num_heads=want["deform_num_heads"],
        num_points=want["n_points"],
        value_ratio=want["deform_ratio"],
        projection=want["projection"],
        norm={"LayerNorm eps 1e-6": "layernorm", "none": "none"}[want["norm"]],
        ffn=want["with_cffn"],
        ffn_ratio=want["cffn_ratio"],
        drop_path_rate=want["drop_path"],
    )
    assert config.merging.kind == ("simple" if fpn["kind"] == "simple" else "regular")
    assert list(config.merging.intermediate_after) == (fpn["out_interaction_indexes"] or [])
    assert config.merging.pyramid_norm == "group"


@pytest.mark.parametrize("name", SETTINGS)
def test_images(name):
    entry, image = zoo.get(name), SETTINGS[name]["image"]
    assert DETECTORS[entry.head] == SETTINGS[name]["detector"]
    assert list(entry.pixel_mean) == image["mean"] and list(entry.pixel_std) == image["std"]
    # the public UperNet pads nothing: its crops and windows have no remainder
    assert entry.pad_divisor == image["pad_divisor"] or (image["pad_divisor"] is None and entry.pad_divisor == 32)
    assert entry.image_size == max(branch["image_size"] for branch in SETTINGS[name]["branches"])


@pytest.mark.parametrize("name", SETTINGS)
def test_published_numbers(name):
    entry, published = zoo.get(name), SETTINGS[name]["published"]
    readme, paper = published.get("readme", {}), published.get("paper", {})
    assert entry.published == zoo.PublishedNumbers(
        box_ap=readme.get("box_AP"),
        mask_ap=readme.get("mask_AP"),
        miou=readme.get("mIoU"),
        params_m=readme.get("params_M"),
        flops_g=readme.get("flops_G"),
    )
    for ours, printed, papers in (
        (entry.paper.box_ap, readme.get("box_AP"), paper.get("APb")),
        (entry.paper.mask_ap, readme.get("mask_AP"), paper.get("APm")),
        (entry.paper.miou, readme.get("mIoU"), paper.get("mIoU")),
        (entry.paper.params_m, readme.get("params_M"), paper.get("params_M")),
        (entry.paper.flops_g, readme.get("flops_G"), paper.get("flops_G")),
    ):
        assert ours == (papers if papers != printed else None)


@pytest.mark.parametrize("name", PAPER_ONLY)
def test_numbers_that_the_paper_alone_prints(name):
    paper = zoo.get(name).paper
    assert (paper.box_ap, paper.mask_ap, paper.params_m, paper.flops_g) == PAPER_ONLY[name]
    assert zoo.get(name).published == zoo.PublishedNumbers()


def test_titles_leave_the_sizes_to_the_resolution():
    titles = {(entry.table, entry.title, entry.resolution) for entry in zoo.entries()}
    assert len(titles) == len(zoo.entries())
    assert not any(entry.resolution in entry.title for entry in zoo.entries())


def test_config_files():
    assert zoo.get("piip_tsb_1120_896_448").config_file == "COCO/mask_rcnn_piip_tsb_1120_896_448_1x.py"
    assert zoo.get("piip_lh6b_1536_1024_512_dino").config_name == "dino_piip_lh6b_1536_1024_512_2x_ms"
    assert zoo.get("piip_h6b_512_192_upernet").config_file == "ADE20K/upernet_piip_h6b_512_192_80k.py"


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
