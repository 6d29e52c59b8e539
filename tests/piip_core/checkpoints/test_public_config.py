"""Vision towers in the public field names; what the fields mean is proven by the golden cases."""

import pytest

from piip_core import ConvNeXtConfig, ViTConfig
from piip_core.checkpoints.public_config import config_from_public
from piip_core.errors import CheckpointError, NotSupportedYet

SHAPES = {
    "branch1.clip_model.embeddings.patch_embedding.weight": (64, 3, 16, 16),
    "branch1.clip_model.embeddings.position_embedding.weight": (17, 64),
    "branch1.clip_model.encoder.layers.0.mlp.fc1.weight": (256, 64),
    "branch1.clip_model.encoder.layers.1.mlp.fc1.weight": (256, 64),
    "branch2.convnext_model.stem.0.conv_dw": (8, 1, 4, 4),
}
for stage, dim in ((0, 8), (1, 16), (2, 24), (3, 32)):
    SHAPES[f"branch2.convnext_model.stages.{stage}.blocks.0.weight"] = (dim,)
SHAPES["branch2.convnext_model.stages.1.blocks.1.weight"] = (16,)
SECOND = {key: shape for key, shape in SHAPES.items() if key.startswith("branch2.")}
CLIP = {"real_size": 64, "interaction_indexes": [[0, 0], [1, 1]], "use_cls_token": True}
CONVNEXT = {"real_size": 128, "interaction_indexes": [[0, 4], [5, 7]], "drop_path_rate": 0.3}


def read(shapes=SHAPES, convnext=CONVNEXT, **top):
    return config_from_public({"branch1": CLIP, "branch2": convnext, **top}, shapes)


def test_sizes_come_from_the_parameters():
    clip, convnext = read().branches
    assert clip.network == ViTConfig(
        embed_dim=64,
        depth=2,
        num_heads=1,
        pos_grid=4,
        layer_scale=None,
        norm_eps=1e-5,
        activation="quick_gelu",
        pre_norm=True,
        class_token=True,
        class_position=True,
    )
    assert convnext.network == ConvNeXtConfig(depths=(1, 2, 1, 1), stage_dims=(8, 16, 24, 32))
    assert (convnext.segments, convnext.drop_path_schedule) == (((0, 4), (5, 7)), "linear")


def test_every_interaction_field_is_read():
    assert (read().interaction.num_heads, read().interaction.attention) == (6, "regular")
    interaction = read(
        n_points=3,
        deform_num_heads=8,
        with_cffn=True,
        cffn_ratio=0.5,
        deform_ratio=0.25,
        interact_attn_type="deform",
        interaction_drop_path_rate=0.1,
        interaction_proj=False,
        norm_layer="none",
    ).interaction
    assert (interaction.num_interactions, interaction.num_points, interaction.num_heads) == (2, 3, 8)
    assert (interaction.ffn, interaction.ffn_ratio, interaction.value_ratio) == (True, 0.5, 0.25)
    assert (interaction.attention, interaction.drop_path_rate) == ("deformable", 0.1)
    assert (interaction.projection, interaction.norm) == (False, "none")


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        ({"some_new_field": 1}, "some_new_field"),
        ({"norm_layer": "bn"}, "norm_layer"),
        ({"interact_attn_type": "linear"}, "linear"),
        ({"convnext": CONVNEXT | {"downsample_ratios": [4] * 8}}, "downsample_ratios"),
        ({"shapes": SECOND | {"branch1.blocks.0.gamma_1": (8,)}}, "class deit"),
        ({"shapes": SECOND | {"branch1.stem.conv": (8,)}}, r"stem\.conv"),
    ],
)
def test_what_cannot_be_expressed_is_named(change, feature):
    with pytest.raises(NotSupportedYet, match=feature):
        read(**change)


def test_files_with_other_branches_are_errors():
    with pytest.raises(CheckpointError, match=r"branch1\."):
        read(SECOND)
    with pytest.raises(CheckpointError, match="branch1 to branchN"):
        read(branch4=CLIP)
