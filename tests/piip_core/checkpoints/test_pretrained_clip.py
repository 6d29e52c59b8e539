"""CLIP weights into branches, against the libraries' own forward passes."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from piip_core import BranchConfig, ConvNeXtConfig, ViTConfig
from piip_core.branches import build_branch
from piip_core.checkpoints import load_branch
from piip_core.errors import CheckpointError

open_clip = pytest.importorskip("open_clip")

SIZES = dict(embed_dim=64, depth=3, num_heads=4)


def clip_network(patch_size=16, pos_grid=4, **options) -> ViTConfig:
    options = dict(class_token=True, class_position=True, activation="quick_gelu") | options
    return ViTConfig(
        **SIZES, patch_size=patch_size, pos_grid=pos_grid, norm_eps=1e-5, layer_scale=None, pre_norm=True, **options
    )


def loaded(network, state, tmp_path):
    branch = build_branch(BranchConfig(network=network, image_size=64)).eval()
    torch.save(state, tmp_path / "weights.pth")
    return branch, load_branch(branch, str(tmp_path / "weights.pth"))


def noisy(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return module.eval()


def huggingface_clip() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, image_size=64, patch_size=16
    )
    return noisy(CLIPVisionModel(config))


@pytest.mark.parametrize("whole", [False, True])
def test_transformers_clip_gives_its_own_features(tmp_path, whole):
    reference = huggingface_clip()
    state = reference.state_dict()
    if whole:  # as in the files of models of images and texts
        state = {f"vision_model.{key}": value for key, value in state.items()}
        state |= {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.ones(())}
    branch, report = loaded(clip_network(), state, tmp_path)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        state = branch.run(branch.embed(image), 0, 3)
        expected = reference(image, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(state.sequence(), expected, rtol=1e-4, atol=1e-5)
    expected = {"branches have no final norm"} | ({"belongs to the text side"} if whole else set())
    assert set(report.ignored.values()) == expected


@pytest.mark.parametrize("quick", [True, False])
def test_open_clip_gives_its_own_features(tmp_path, quick):
    vision = {"image_size": 64, "layers": 3, "width": 64, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    reference = noisy(open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text), quick))
    network = clip_network(activation="quick_gelu" if quick else "gelu")
    branch, report = loaded(network, reference.state_dict(), tmp_path)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        state = branch.run(branch.embed(image), 0, 3)
        out = reference.visual.forward_intermediates(image, indices=[2], normalize_intermediates=False)
    torch.testing.assert_close(state.tokens.permute(0, 3, 1, 2), out["image_intermediates"][0], rtol=1e-4, atol=1e-5)
    assert "belongs to the text side" in report.ignored.values()


def test_open_clip_convnext_gives_the_features_of_its_trunk(tmp_path):
    vision = {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    reference = noisy(open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)))
    network = ConvNeXtConfig(depths=(2, 2, 6, 2), stage_dims=(40, 80, 160, 320))
    state = {key: value for key, value in reference.state_dict().items() if ".mlp." not in key or value.ndim < 4}
    wide = {key: value.flatten(1) for key, value in reference.state_dict().items() if key not in state}
    branch, _ = loaded(network, state | wide, tmp_path)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = branch.run(branch.embed(image), 0, branch.num_blocks).tokens
        expected = reference.visual.trunk.stages(reference.visual.trunk.stem(image))
    torch.testing.assert_close(tokens.permute(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-4)


def test_patch_kernel_and_positions_are_resized_and_the_class_entry_kept(tmp_path):
    reference = huggingface_clip()
    branch, report = loaded(clip_network(patch_size=8, pos_grid=6), reference.state_dict(), tmp_path)
    table = reference.state_dict()["embeddings.position_embedding.weight"]
    kernel = reference.state_dict()["embeddings.patch_embedding.weight"]
    torch.testing.assert_close(branch.model.pos_embed[0, 0], table[0])
    torch.testing.assert_close(
        branch.model.patch_embed.proj.weight,
        torch.nn.functional.interpolate(kernel, size=(8, 8), mode="bicubic", align_corners=False),
    )
    assert any("4 x 4 to 6 x 6" in note for note in report.notes)


def test_a_branch_without_class_token_drops_its_weights(tmp_path):
    network = clip_network(class_token=False, class_position=False)
    _, report = loaded(network, huggingface_clip().state_dict(), tmp_path)
    assert "the branch has no class token" in report.ignored.values()


def test_a_missing_value_projection_is_reported(tmp_path):
    state = huggingface_clip().state_dict()
    del state["encoder.layers.1.self_attn.v_proj.weight"]
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.qkv\.weight"):
        loaded(clip_network(), state, tmp_path)


def test_unknown_weights_of_open_clip_name_those_there_are():
    branch = build_branch(BranchConfig(network=clip_network(), image_size=64))
    with pytest.raises(CheckpointError, match="tags of ViT-B-16 are openai"):
        load_branch(branch, "open_clip:ViT-B-16/nothing")
