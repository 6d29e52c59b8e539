"""Pretrained weights into branches; the position and kernel arithmetic is proven by the load_* golden cases."""

import dataclasses

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from piip_core import PIIP, BranchConfig, ViTConfig
from piip_core.branches import build_branch
from piip_core.checkpoints import load_branch, load_pretrained
from piip_core.errors import CheckpointError

NETWORK = ViTConfig(embed_dim=16, depth=2, num_heads=2, pos_grid=4)


def branch_of(**options):
    return build_branch(BranchConfig(network=dataclasses.replace(NETWORK, **options), image_size=64))


def timm_vit(**options):
    """A timm network of the same size, every parameter random."""
    torch.manual_seed(0)
    settings = {"img_size": 64, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = VisionTransformer(**{**settings, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def test_a_branch_computes_what_the_pretrained_network_does(tmp_path):
    model = timm_vit(init_values=1.0, no_embed_class=True, class_token=False, global_pool="avg")
    torch.save({"model": model.state_dict()}, tmp_path / "vit.pth")
    branch = branch_of()
    report = load_branch(branch, str(tmp_path / "vit.pth"))
    assert {key.split(".")[0] for key in report.ignored} == {"fc_norm", "head"}
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        state = branch.eval().run(branch.embed(image), 0, 2)
        expected = model.eval().forward_intermediates(image, indices=[1], norm=False, intermediates_only=True)[0]
    torch.testing.assert_close(state.tokens.permute(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-4)


def test_files_with_class_and_distillation_tokens(tmp_path):
    state = timm_vit().state_dict()
    grid = state["pos_embed"][:, 1:]
    state["pos_embed"] = torch.cat((torch.full((1, 2, 16), 9.0), grid), dim=1)
    state |= {"dist_token": torch.zeros(1, 1, 16), "head_dist.weight": torch.zeros(5, 16)}
    torch.save(state, tmp_path / "distilled.pth")
    branch = branch_of()
    report = load_branch(branch, str(tmp_path / "distilled.pth"))
    torch.testing.assert_close(branch.model.pos_embed, grid)
    assert report.ignored["dist_token"] and report.ignored["head_dist.weight"]


def test_the_class_token_is_used_where_the_branch_has_one(tmp_path):
    model = timm_vit(no_embed_class=True)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    branch = branch_of(class_token=True)
    report = load_branch(branch, str(tmp_path / "vit.pth"))
    assert "cls_token" in report.used
    assert torch.equal(branch.model.cls_token, model.cls_token)


def test_augreg_npz(tmp_path):
    """The layout of the published arrays, written from a timm network and read back."""
    model = timm_vit()
    state, arrays = model.state_dict(), {}
    heads = (2, 8)
    arrays["cls"] = state["cls_token"].numpy()
    arrays["embedding/kernel"] = state["patch_embed.proj.weight"].permute(2, 3, 1, 0).numpy()
    arrays["embedding/bias"] = state["patch_embed.proj.bias"].numpy()
    arrays["Transformer/posembed_input/pos_embedding"] = state["pos_embed"].numpy()
    arrays["Transformer/encoder_norm/scale"] = state["norm.weight"].numpy()
    arrays["Transformer/encoder_norm/bias"] = state["norm.bias"].numpy()
    arrays["head/kernel"], arrays["head/bias"] = state["head.weight"].T.numpy(), state["head.bias"].numpy()
    for i in range(2):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        attention = theirs + "MultiHeadDotProductAttention_1/"
        weights, biases = (state[f"{ours}attn.qkv.{name}"].chunk(3) for name in ("weight", "bias"))
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}{name}/kernel"] = weight.T.reshape(16, *heads).numpy()
            arrays[f"{attention}{name}/bias"] = bias.reshape(heads).numpy()
        arrays[f"{attention}out/kernel"] = state[ours + "attn.proj.weight"].T.reshape(*heads, 16).numpy()
        arrays[f"{attention}out/bias"] = state[ours + "attn.proj.bias"].numpy()
        for layer, name in ((0, "fc1"), (1, "fc2")):
            arrays[f"{theirs}MlpBlock_3/Dense_{layer}/kernel"] = state[f"{ours}mlp.{name}.weight"].T.numpy()
            arrays[f"{theirs}MlpBlock_3/Dense_{layer}/bias"] = state[f"{ours}mlp.{name}.bias"].numpy()
        for layer, name in ((0, "norm1"), (2, "norm2")):
            arrays[f"{theirs}LayerNorm_{layer}/scale"] = state[f"{ours}{name}.weight"].numpy()
            arrays[f"{theirs}LayerNorm_{layer}/bias"] = state[f"{ours}{name}.bias"].numpy()
    np.savez(tmp_path / "augreg.npz", **arrays)
    branch = branch_of()
    load_branch(branch, str(tmp_path / "augreg.npz"))
    for name, tensor in branch.model.state_dict().items():
        expected = state["pos_embed"][:, 1:] if name == "pos_embed" else state.get(name)
        if expected is not None:
            torch.testing.assert_close(tensor, expected, msg=name)


def test_unknown_keys_are_an_error_that_names_them(tmp_path):
    state = timm_vit().state_dict() | {"blocks.0.attn.q_norm.weight": torch.ones(8)}
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"vit\.pth[\s\S]*q_norm"):
        load_branch(branch_of(), str(tmp_path / "vit.pth"))


@pytest.mark.parametrize(("change", "problem"), [({"depth": 3}, "lacks"), ({"embed_dim": 32}, "shape")])
def test_another_network_does_not_load(change, problem, tmp_path):
    torch.save(timm_vit().state_dict(), tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=problem):
        load_branch(branch_of(**change), str(tmp_path / "vit.pth"))


def test_timm_names(monkeypatch):
    model = timm_vit(init_values=1.0)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: model)
    branch = branch_of()
    load_branch(branch, "timm:deit3_small_patch16_224.fb_in22k_ft_in1k")
    assert torch.equal(branch.model.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    with pytest.raises(CheckpointError, match="no model 'not_a_model'"):
        load_branch(branch, "timm:not_a_model")


def test_without_internet_the_error_says_what_to_do(monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"deit_tiny.*Network is unreachable.*local file.*null"):
        load_branch(branch_of(), "timm:deit_tiny_patch16_224.fb_in1k")


def test_a_pyramid_loads_what_its_branches_name(tiny_config, tmp_path):
    model = timm_vit(init_values=1.0, embed_dim=32, num_heads=4)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    config = tiny_config()
    first = dataclasses.replace(config.branches[0], pretrained=str(tmp_path / "vit.pth"))
    pyramid = PIIP(dataclasses.replace(config, branches=(first, *config.branches[1:])))
    before = pyramid.branches[1].model.pos_embed.clone()
    reports = load_pretrained(pyramid)
    assert list(reports) == [1]
    assert torch.equal(pyramid.branches[0].model.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    assert torch.equal(pyramid.branches[1].model.pos_embed, before)
    missing = dataclasses.replace(config.branches[1], pretrained=str(tmp_path / "nothing.pth"))
    pyramid = PIIP(dataclasses.replace(config, branches=(config.branches[0], missing, config.branches[2])))
    with pytest.raises(CheckpointError, match=r"branch 2: .*nothing\.pth: no such file"):
        load_pretrained(pyramid)
