"""ConvNeXt branches against timm's and transformers' own networks."""

import pytest
import torch
from timm.models.convnext import ConvNeXt

from piip_core import BranchConfig, ConfigError
from piip_core.branches import ConvNeXtConfig, build_branch
from piip_core.checkpoints import convert_pretrained

NETWORK = ConvNeXtConfig(depths=(1, 2, 3, 1), stage_dims=(8, 16, 24, 32), layer_scale=1.0)
SIZES = [(64, 64), (96, 70)]


def branch_of(**options):
    return build_branch(BranchConfig(network=NETWORK, image_size=64, drop_path_schedule="linear", **options))


@torch.no_grad()
def stage_outputs(branch, image):
    """Maps (B, C, H, W) after the last block of each stage, cut there as segments cut."""
    state, start, maps = branch.embed(image), 0, []
    for last in NETWORK.last_blocks():
        state = branch.run(state, start, last + 1)
        maps.append(state.tokens.permute(0, 3, 1, 2))
        start = last + 1
    assert start == branch.num_blocks
    return maps


@pytest.mark.parametrize("size", SIZES)
def test_a_branch_computes_what_timm_does(size, randomize):
    branch = randomize(branch_of()).eval()
    reference = ConvNeXt(depths=NETWORK.depths, dims=NETWORK.stage_dims, ls_init_value=1.0, num_classes=0).eval()
    missing, unexpected = reference.load_state_dict(branch.model.state_dict(), strict=False)
    assert not unexpected and set(missing) == {"head.norm.weight", "head.norm.bias"}
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = reference.forward_intermediates(image, intermediates_only=True)[-4:]
        torch.testing.assert_close(stage_outputs(branch, image)[-1], reference.forward_features(image))
    for actual, stage in zip(stage_outputs(branch, image), expected, strict=True):
        torch.testing.assert_close(actual, stage, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_head", [False, True])
def test_a_branch_computes_what_transformers_does(size, with_head, randomize):
    """The names of the released files are transformers', with and without head."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.ConvNextConfig(
        depths=list(NETWORK.depths), hidden_sizes=list(NETWORK.stage_dims), num_labels=3
    )
    kind = transformers.ConvNextForImageClassification if with_head else transformers.ConvNextModel
    reference = randomize(kind(settings)).eval()
    branch = branch_of().eval()
    converted, report = convert_pretrained(reference.state_dict(), branch.model.state_dict())
    report.check()
    assert not report.filled
    branch.model.load_state_dict(converted)
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = reference(image, output_hidden_states=True).hidden_states
    for actual, stage in zip(stage_outputs(branch, image), expected[-4:], strict=True):
        torch.testing.assert_close(actual, stage, rtol=1e-4, atol=1e-5)


def test_downsampling_counts_as_a_block():
    assert NETWORK.depth == 10 and NETWORK.last_blocks() == (0, 3, 7, 9)
    assert NETWORK.strides == (4, 8, 8, 8, 16, 16, 16, 16, 32, 32)
    state = (branch := branch_of().eval()).embed(torch.randn(1, 3, 64, 64))
    for index, (dim, stride) in enumerate(zip(NETWORK.dims, NETWORK.strides, strict=True)):
        state = branch.run_block(state, index)
        assert state.tokens.shape == (1, 64 // stride, 64 // stride, dim)
    with pytest.raises(ConfigError, match="4 stages"):
        ConvNeXtConfig(depths=(1, 2))


def test_stochastic_depth_grows_over_the_blocks_and_skips_the_downsampling():
    branch = branch_of(drop_path_rate=0.6)
    rates = [block.drop_path.drop_prob for stage in branch.model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert all(branch.layer_of(name) is None for name, _ in branch.named_parameters())
