import pytest
import torch
import torch.nn.functional as F

from piip_core import ConfigError
from piip_core.merging import BranchMerging, ClassificationMerging, FeaturePyramid, TokenMerging

DIMS = (32, 24, 16)


def branch_maps():
    return [torch.randn(2, d, s, s + 1) for d, s in zip(DIMS, (3, 5, 8), strict=True)]


def test_is_the_weighted_sum_of_equation_4(randomize):
    merging = randomize(BranchMerging(DIMS, (1, 2, 3), convs=2, num_groups=8))
    maps = branch_maps()
    expected = sum(
        merging.weights[n - 1]
        * F.interpolate(merging.projections[str(n)](maps[n - 1]), size=(8, 9), mode="bilinear", align_corners=False)
        for n in (1, 2, 3)
    )
    torch.testing.assert_close(merging(maps), expected)


def test_only_chosen_branches_take_part():
    merging = BranchMerging(DIMS, (1, 3), convs=2, num_groups=8)
    maps = branch_maps()
    merged = merging(maps)
    maps[1] = maps[1] + 1
    assert torch.equal(merging(maps), merged) and merged.shape == (2, 32, 8, 9)
    assert list(merging.projections) == ["1", "3"] and merging.weights.shape == (2,)


def test_regular_form_has_no_convolution_for_branch_1():
    merging = BranchMerging(DIMS, (1, 2, 3), convs=1, num_groups=8)
    convs = [sum(isinstance(m, torch.nn.Conv2d) for m in p) for p in merging.projections.values()]
    assert convs == [0, 1, 1]


def test_groups_must_divide_the_width():
    with pytest.raises(ConfigError, match="num_groups=7"):
        BranchMerging(DIMS, (1,), convs=2, num_groups=7)


@pytest.mark.parametrize("stride", [8, 16])
def test_levels_have_their_strides(stride):
    pyramid = FeaturePyramid([32] * 4, [stride] * 4, (4, 8, 16, 32))
    x = torch.randn(1, 32, 64 // stride, 128 // stride)
    assert [tuple(m.shape[-2:]) for m in pyramid([x] * 4)] == [(64 // s, 128 // s) for s in (4, 8, 16, 32)]


def test_maps_that_have_their_strides_pass_unchanged():
    pyramid = FeaturePyramid([8, 16], [4, 8], (4, 8))
    maps = [torch.randn(1, 8, 4, 4), torch.randn(1, 16, 2, 2)]
    assert all(a is b for a, b in zip(pyramid(maps), maps, strict=True))


def test_impossible_stride_is_named():
    with pytest.raises(ConfigError, match="stride 32 cannot be brought to stride 4"):
        FeaturePyramid([32], [32], (4,))


def test_classification_merging_is_invariant_to_where_things_are(randomize):
    head = randomize(ClassificationMerging((32, 16), 5, num_groups=8))
    maps = [torch.randn(2, 32, 4, 4), torch.randn(2, 16, 4, 4)]
    assert head(maps).shape == (2, 5)
    torch.testing.assert_close(head([m.flip(-1) for m in maps]), head(maps), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["group", "layer", "none"])
def test_projectors_before_and_after_resizing_are_the_same(randomize, norm):
    """Maps that grow are projected first; the definition resizes first."""
    merging = randomize(TokenMerging(DIMS, 64, norm=norm, num_groups=8, grid=5)).double()
    maps = [
        torch.randn(2, dim, *size, dtype=torch.float64)
        for dim, size in zip(DIMS, ((3, 4), (5, 5), (8, 9)), strict=True)
    ]
    expected = 0
    for x, projection in zip(maps, merging.projections.values(), strict=True):
        x = F.interpolate(x.float(), size=(5, 5), mode="bilinear", align_corners=False).double()
        x = projection.linear_1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = projection.norm(x) if norm == "group" else projection.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        expected = expected + projection.linear_2(F.gelu(x).permute(0, 2, 3, 1))
    torch.testing.assert_close(merging(maps), expected.flatten(1, 2), rtol=1e-5, atol=1e-5)


def test_growing_maps_are_projected_on_their_own_grid():
    merging = TokenMerging((8, 8, 8), 16, norm="none", grid=6)
    cells = []
    for projection in merging.projections.values():
        projection.linear_1.register_forward_hook(lambda module, args, output: cells.append(output[0, ..., 0].numel()))
    merging([torch.randn(1, 8, side, side) for side in (3, 6, 12)])
    assert cells == [9, 36, 36]


@pytest.mark.parametrize("merge_by", ["average", "shuffle"])
@pytest.mark.parametrize("merge", [2, 3])
def test_squares_of_cells_become_one_token_each(randomize, merge, merge_by):
    """On the grid of Branch 2, of 6 x 12 cells; rows end with a learned token."""
    options = dict(merge=merge, merge_by=merge_by, grid_branch=2, newline=True)
    merging = randomize(TokenMerging(DIMS, 16, norm="none", **options)).double()
    sizes = ((3, 6), (6, 12), (12, 24))
    maps = [torch.randn(2, dim, *size, dtype=torch.float64) for dim, size in zip(DIMS, sizes, strict=True)]
    tokens = merging(maps).unflatten(1, (6 // merge, 12 // merge + 1))
    torch.testing.assert_close(tokens[:, :, -1], merging.newline.detach().expand(2, 6 // merge, 16))
    row, column = 1, 2
    expected = 0
    for x, projection in zip(maps, merging.projections.values(), strict=True):
        x = F.interpolate(x.float(), size=(6, 12), mode="bilinear", align_corners=False).double()
        square = x[:, :, row * merge : (row + 1) * merge, column * merge : (column + 1) * merge]
        seen = square.mean(dim=(2, 3)) if merge_by == "average" else square.flatten(1)
        expected = expected + projection.linear_2(F.gelu(projection.linear_1(seen)))
    torch.testing.assert_close(tokens[:, row, column], expected, rtol=1e-5, atol=1e-5)


def test_settings_of_visual_tokens_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="merge=2: expected a divisor of the sides of the grid of 3 x 4 cells"):
        TokenMerging((8,), 16, norm="none", merge=2)([torch.zeros(1, 8, 3, 4)])
    with pytest.raises(ConfigError, match="grid_branch=3: expected a branch from 1 to 2"):
        TokenMerging((8, 8), 16, grid_branch=3)


@pytest.mark.parametrize(
    "module",
    [BranchMerging([32, 16, 8], (1, 3), convs=2, num_groups=4), ClassificationMerging([32, 16], 5, num_groups=4)],
)
def test_weights_that_were_a_scalar_for_each_branch_are_read(module):
    state = module.state_dict()
    weights = torch.arange(2.0) + 3
    del state["weights"]
    state |= {f"weights.{number}": weight for number, weight in zip(module.projections, weights, strict=True)}
    module.load_state_dict(state)
    assert torch.equal(module.weights.detach(), weights)
    with pytest.raises(RuntimeError, match="weights"):
        module.load_state_dict({name: x for name, x in state.items() if name != "weights.1"})
