"""Published pretrained formats of every family, by the listings of their files."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from scipy.interpolate import RectBivariateSpline

from piip_core import BranchConfig, ViTConfig, zoo
from piip_core.branches import BEiTConfig, build_branch
from piip_core.checkpoints import convert_pretrained
from piip_core.checkpoints.pretrained import load_branch, resize_relative_positions
from piip_core.errors import CheckpointError
from piip_core.meta import on_meta
from piip_core.zoo import networks

# listing -> the published network that starts from it
FILES = {
    "pretrained_beitv2_base_pt1k_ft21k": networks.BEIT["B"],
    "pretrained_beitv2_large_pt1k_ft21k": networks.BEIT["L"],
    "pretrained_uniperceiver_base": networks.UNIPERCEIVER["B"],
    "pretrained_uniperceiver_large": networks.UNIPERCEIVER["L"],
    "pretrained_mae_vit_base": networks.MAE["B"],
    "pretrained_mae_vit_large": networks.MAE["L"],
    "pretrained_mae_vit_huge": networks.MAE["H"],
    "pretrained_dinov2_vits14": networks.DINOV2["S"],
    "pretrained_dinov2_vitb14": networks.DINOV2["B"],
    "pretrained_dinov2_vitl14": networks.DINOV2["L"],
    "pretrained_augreg_B16_384_converted": networks.AUGREG_384["B"],
    "pretrained_augreg_L16_384_converted": networks.AUGREG_384["L"],
    "pretrained_deit3_base_384_21k": networks.DEIT3_384["B"],
    "pretrained_deit3_large_224_21k": networks.VIT["L"],
    "pretrained_deit_tiny_patch16_224": networks.VIT["T"],
    "pretrained_intern_vit_6b_224px": networks.INTERNVIT["6B"],
    "pretrained_hf_convnext_tiny_224": networks.CONVNEXT["T"],
    "pretrained_hf_convnext_small_224": networks.CONVNEXT["S"],
    "pretrained_hf_convnext_base_224": networks.CONVNEXT["B"],
}
BEIT = BEiTConfig(embed_dim=16, depth=2, num_heads=2, bias_window=4)


def meta_branch(network):
    with on_meta():
        window = network.bias_window if isinstance(network, BEiTConfig) else None
        return build_branch(BranchConfig(network=network, image_size=224, window_size=window))


@pytest.mark.parametrize("file", FILES)
def test_every_key_of_a_published_file_is_accounted_for(file, listing):
    shapes = listing(file)
    # tables are resized, which takes real numbers; everything else needs no memory
    state = {
        key: torch.rand(shape) if "relative_position" in key else torch.empty(shape, device="meta")
        for key, shape in shapes.items()
    }
    target = meta_branch(FILES[file]).model.state_dict()
    converted, report = convert_pretrained(state, target)
    assert report.check() is report
    assert {*report.used, *report.ignored} == set(shapes)
    assert {*converted, *report.filled} == set(target)
    assert all(converted[name].shape == target[name].shape for name in converted)


def test_convnext_files_may_have_the_prefix_of_a_classifier(listing):
    file = "pretrained_hf_convnext_tiny_224"
    state = {f"convnext.{key}": torch.empty(shape, device="meta") for key, shape in listing(file).items()}
    state |= {"classifier.weight": torch.empty(1000, 768), "classifier.bias": torch.empty(1000)}
    converted, report = convert_pretrained(state, meta_branch(FILES[file]).model.state_dict())
    assert report.check() and set(converted) == set(meta_branch(FILES[file]).model.state_dict())


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("convnext_tiny", networks.CONVNEXT["T"]),
        ("convnext_base", networks.CONVNEXT["B"]),
        ("beitv2_base_patch16_224", networks.BEIT["B"]),
    ],
)
def test_timms_networks_have_our_names(name, network):
    with on_meta():
        theirs = timm.create_model(name).state_dict()
    theirs = {k: torch.rand(v.shape) if "relative_position" in k else v for k, v in theirs.items()}
    target = meta_branch(network).model.state_dict()
    converted, report = convert_pretrained(theirs, target)
    assert report.check() and set(converted) == set(target)


def beit_state(window=3, extra=3, shared=False):
    target = build_branch(BranchConfig(network=BEIT, image_size=64, window_size=4)).model.state_dict()
    state = {name: torch.randn_like(tensor) for name, tensor in target.items()}
    table = torch.randn((2 * window - 1) ** 2 + extra, 2)
    tables = [name for name in state if name.endswith("relative_position_bias_table")]
    for name in tables:
        state[name] = table
    if shared:
        for name in tables:
            del state[name]
        state["rel_pos_bias.relative_position_bias_table"] = table
    return state, target, table


@pytest.mark.parametrize("shared", [False, True])
def test_relative_positions_are_resized_for_every_block(shared):
    state, target, table = beit_state(shared=shared)
    converted, report = convert_pretrained(state, target)
    assert report.check() and any("5 x 5 to 7 x 7" in note for note in report.notes)
    expected = resize_relative_positions(table[:-3], 7)
    for block in range(2):
        assert torch.equal(converted[f"blocks.{block}.attn.relative_position_bias_table"], expected)


def test_relative_positions_follow_the_published_splines():
    """The grid solved for here is the one the positions must lie on: its outermost point is the new table's."""
    table = torch.randn(27 * 27, 2, dtype=torch.float64)
    low, high = 1.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**k for k in range(13)) < 27 else (low, middle)
    grid = [sum(low**k for k in range(n)) for n in range(14)]
    grid = [-x for x in grid[:0:-1]] + grid
    wanted = range(-27, 28)
    ours = resize_relative_positions(table, 55).reshape(55, 55, 2)
    for head in range(2):
        spline = RectBivariateSpline(grid, grid, table[:, head].reshape(27, 27).numpy())
        expected = torch.from_numpy(spline(wanted, wanted))
        # the published ratio is found to 1e-6 only
        torch.testing.assert_close(ours[..., head].double(), expected, atol=2e-3, rtol=0)


def test_a_file_that_does_not_fit_changes_nothing(tmp_path, randomize):
    network = ViTConfig(embed_dim=16, depth=2, num_heads=2, pos_grid=4)
    branch = randomize(build_branch(BranchConfig(network=network, image_size=64)))
    state = {name: tensor + 1 for name, tensor in branch.model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in branch.model.state_dict().items()}
    state["surprise"] = torch.zeros(1)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="surprise"):
        load_branch(branch, str(tmp_path / "weights.safetensors"))
    for name, tensor in branch.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_every_row_names_a_source_for_every_branch():
    for entry in zoo.entries():
        assert all(branch.pretrained for branch in entry.config.branches), entry.name
