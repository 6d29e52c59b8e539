"""Public configuration fields to our configuration; what they mean is proven by the golden cases."""

import pytest

from piip_core.branches import BEiTConfig, ConvNeXtConfig
from piip_core.checkpoints import config_from_public
from piip_core.errors import CheckpointError, NotSupportedYet

VIT = {"depth": 2, "embed_dim": 32, "num_heads": 4, "qkv_bias": True, "pretrain_img_size": 64, "init_scale": 1.0}
INTERNVIT = {**VIT, "patch_size": 16, "init_values": 0.5, "qk_normalization": False, "norm_layer_type": "LayerNorm"}
del INTERNVIT["init_scale"]


def branch(settings, size, **changes):
    return {**settings, "real_size": size, "interaction_indexes": [[0, 0], [1, 1]], **changes}


def shapes_of(widths, last_key="gamma_1", depth=2):
    shapes = {}
    for number, width in enumerate(widths, 1):
        prefix = f"branch{number}."
        shapes[prefix + "patch_embed.proj.weight"] = (width, 3, 16, 16)
        shapes[prefix + "pos_embed"] = (1, 4 * 4, width)
        for block in range(depth):
            shapes[f"{prefix}blocks.{block}.norm1.bias"] = (width,)
            shapes[f"{prefix}blocks.{block}.{last_key}"] = (width,)
    return shapes


def two_branches(first=None, second=None, shapes=None, **top):
    public = {"branch1": branch(VIT, 64, **(first or {})), "branch2": branch(VIT, 128, **(second or {})), **top}
    return config_from_public(public, shapes or shapes_of((32, 32)))


def test_absent_fields_have_the_public_defaults():
    config = two_branches().config
    assert config.branches[0].network.patch_size == 16
    assert config.branches[0].network.pos_grid == 4
    assert config.branches[0].window_sizes == (None, None)
    assert config.branches[0].window_padding == "after_qkv"
    assert (config.interaction.num_heads, config.interaction.value_ratio) == (6, 1.0)
    assert (config.interaction.attention, config.interaction.ffn) == ("regular", False)
    assert config.merging.out_strides == (4, 8, 16, 32)


def test_position_grid_is_that_of_the_file():
    """Segmentation files have the grid of the crop, and some one more entry for a class token."""
    shapes = shapes_of((32, 32)) | {"branch1.pos_embed": (1, 6 * 6, 32), "branch2.pos_embed": (1, 8 * 8 + 1, 32)}
    assert [branch.network.pos_grid for branch in two_branches(shapes=shapes).config.branches] == [6, 8]


def test_every_interaction_field_is_read():
    config = two_branches(
        n_points=3,
        deform_num_heads=8,
        with_cffn=True,
        cffn_ratio=0.5,
        deform_ratio=0.25,
        interact_attn_type="deform",
        interaction_drop_path_rate=0.1,
        interaction_proj=False,
        norm_layer="none",
        is_dino=True,
    ).config
    interaction = config.interaction
    assert (interaction.num_interactions, interaction.num_points, interaction.num_heads) == (2, 3, 8)
    assert (interaction.ffn, interaction.ffn_ratio, interaction.value_ratio) == (True, 0.5, 0.25)
    assert (interaction.attention, interaction.drop_path_rate) == ("deformable", 0.1)
    assert (interaction.projection, interaction.norm) == (False, "none")
    assert config.merging.out_strides == (8, 16, 32)


def test_windows_need_both_the_flag_and_a_size():
    windows = {"window_attn": [True, False], "window_size": [4, 4], "use_flash_attn": True}
    first = two_branches(first=windows).config.branches[0]
    assert first.window_sizes == (4, None)
    assert first.window_padding == "before_qkv"
    first = two_branches(first={"window_attn": [True, True], "window_size": [4, -1]}).config.branches[0]
    assert first.window_sizes == (4, None)


def test_the_parameters_tell_the_class_and_not_the_file_name():
    public = {f"branch{i}": branch(INTERNVIT, 64 * i, pretrained="deit_x", window_attn=True) for i in (1, 2)}
    model = config_from_public(public, shapes_of((32, 32), "ls1.gamma"))
    assert model.branch_classes == ("internvit", "internvit")
    first = model.config.branches[0]
    assert (first.drop_path_schedule, first.window_padding) == ("linear", "before_qkv")
    assert first.window_sizes == (14, 14)  # the class's default size
    assert first.network.layer_scale == 0.5
    assert two_branches().branch_classes == ("deit", "deit")


def test_branch_4_is_built_from_whatever_fits_the_parameters():
    narrow = branch(VIT, 256, embed_dim=16, num_heads=2)
    public = {f"branch{i}": branch(VIT, 32 * i) for i in (1, 2, 3)} | {"branch4": narrow}
    own = config_from_public(public, shapes_of((32, 32, 32, 16))).config.branches[3]
    assert (own.network.embed_dim, own.image_size) == (16, 256)
    copied = config_from_public(public, shapes_of((32, 32, 32, 32))).config.branches[3]
    assert (copied.network.embed_dim, copied.network.num_heads, copied.image_size) == (32, 4, 256)
    told = config_from_public(public, shapes_of((32, 32, 32, 32)), branch4_built_from="branch4 config")
    assert told.config.branches[3].network.embed_dim == 16
    with pytest.raises(CheckpointError, match="neither"):
        config_from_public(public, shapes_of((32, 32, 32, 24)))


def test_single_branch_baselines_have_no_branch_fields():
    shapes = {key.removeprefix("branch1."): shape for key, shape in shapes_of((32,)).items()}
    public = {**VIT, "type": "vit_models", "with_fpn": True, "out_indices": [1], "output_dtype": "float32"}
    config = config_from_public(public, shapes).config
    assert (config.merging.kind, config.merging.pyramid_norm, config.num_interactions) == ("single", "layer", 0)
    with pytest.raises(NotSupportedYet, match="last block"):
        config_from_public({**public, "out_indices": [0]}, shapes)


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        ({"some_new_field": 1}, "some_new_field"),
        ({"norm_layer": "bn"}, "norm_layer"),
        ({"interact_attn_type": "linear"}, "linear"),
        ({"first": {"Mlp_block": "sparse"}}, "sparse"),
        ({"first": {"use_abs_pos_emb": True}}, "absolute position"),
        ({"first": {"qk_normalization": True}}, "qk_normalization"),
        ({"first": {"use_cls_token": True}}, "class token"),
        ({"with_simple_fpn": False, "is_dino": True}, "is_dino"),
    ],
)
def test_what_cannot_be_expressed_is_named(change, feature):
    with pytest.raises(NotSupportedYet, match=feature):
        two_branches(**change)


def test_the_fused_mlp_approximates_gelu():
    first = two_branches(first={"Mlp_block": "fused_mlp"}).config.branches[0]
    assert first.network.activation == "gelu_tanh"


def test_internvit_norms_are_read():
    settings = {**INTERNVIT, "qk_normalization": True, "norm_layer_type": "RMSNorm", "mlp_type": "fused_mlp"}
    public = {f"branch{i}": branch(settings, 64 * i) for i in (1, 2)}
    network = config_from_public(public, shapes_of((32, 32), "ls1.gamma")).config.branches[0].network
    assert (network.norm, network.qk_norm, network.activation) == ("rmsnorm", True, "gelu_tanh")
    with pytest.raises(NotSupportedYet, match="BatchNorm"):
        config_from_public(
            {f"branch{i}": branch({**settings, "norm_layer_type": "BatchNorm"}, 64 * i) for i in (1, 2)},
            shapes_of((32, 32), "ls1.gamma"),
        )


def test_beit_windows_come_from_the_tables():
    settings = {key: VIT[key] for key in ("depth", "embed_dim", "num_heads", "qkv_bias")} | {"init_values": 1e-6}
    windows = {"window_attn": [True, True], "window_size": [5, 5], "use_rel_pos_bias": True, "use_abs_pos_emb": False}
    shapes = {key: (81, 4) if key.endswith("table") else shape for key, shape in beit_shapes((32, 32)).items()}
    public = {f"branch{i}": branch({**settings, **windows}, 64 * i) for i in (1, 2)}
    model = config_from_public(public, shapes)
    first = model.config.branches[0]
    assert model.branch_classes == ("beit", "beit")
    assert first.network == BEiTConfig(embed_dim=32, depth=2, num_heads=4, bias_window=5)
    assert (first.window_sizes, first.drop_path_schedule) == ((5, 5), "linear")


def beit_shapes(widths):
    return shapes_of(widths, "attn.relative_position_bias_table")


def test_convnext_sizes_come_from_the_parameters():
    shapes = shapes_of((32,))
    for stage, (count, dim) in enumerate(((1, 8), (2, 16), (1, 24), (1, 32))):
        for layer in range(count):
            name = f"branch2.convnext_model.encoder.stages.{stage}.layers.{layer}.layer_scale_parameter"
            shapes[name] = (dim,)
    settings = {"real_size": 128, "interaction_indexes": [[0, 4], [5, 7]], "drop_path_rate": 0.3}
    public = {"branch1": branch(VIT, 64), "branch2": {**settings, "downsample_ratios": [4, 8, 8, 8, 16, 16, 32, 32]}}
    second = config_from_public(public, shapes).config.branches[1]
    assert second.network == ConvNeXtConfig(depths=(1, 2, 1, 1), stage_dims=(8, 16, 24, 32))
    assert (second.segments, second.drop_path_schedule) == (((0, 4), (5, 7)), "linear")
    with pytest.raises(NotSupportedYet, match="downsample_ratios"):
        config_from_public({**public, "branch2": {**settings, "downsample_ratios": [4] * 8}}, shapes)


def test_unknown_families_are_named():
    with pytest.raises(NotSupportedYet, match=r"stem\.conv"):
        config_from_public(
            {f"branch{i}": branch(VIT, 64) for i in (1, 2)}, {f"branch{i}.stem.conv": (1,) for i in (1, 2)}
        )


def test_a_file_with_fewer_branches_is_an_error():
    with pytest.raises(CheckpointError, match=r"branch2\."):
        two_branches(shapes=shapes_of((32,)))
