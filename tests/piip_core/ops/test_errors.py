"""Wrong arguments are refused with an error that names the argument, what it is and what was expected."""

import numpy as np
import pytest
import torch

from piip_core.ops import MSDeformAttn, deform_attn_grid, ms_deform_attn, operator_status

WRONG = [
    ("value", [1.0], TypeError, "value is list; expected a torch.Tensor"),
    ("value", torch.ones(2, 35, 3, 6, dtype=torch.int32), TypeError, "value has dtype torch.int32"),
    ("value", torch.ones(2, 35, 18), ValueError, r"value has shape \(2, 35, 18\); expected \(B, S"),
    ("attention_weights", torch.ones(2, 13, 3, 1, 4).bool(), TypeError, "has dtype torch.bool; expected float64"),
    ("attention_weights", torch.ones(2, 13, 3, 1, 5), ValueError, r"P\) = \(2, 13, 3, 1, 4\) as sampling_locations"),
    ("attention_weights", torch.ones(2, 13, 3, 1, 4, device="meta"), ValueError, "weights is on meta, value on cpu"),
    ("sampling_locations", torch.ones(2, 13, 3, 1, 2), ValueError, r"\(2, 13, 3, 1, 2\); expected \(B, Q, M, L, P, 2"),
    ("sampling_locations", torch.ones(2, 13, 3, 1, 4, 3), ValueError, r"expected .* = \(2, Q, 3, 1, P, 2\)"),
    ("sampling_locations", torch.ones(1, 13, 3, 1, 4, 2), ValueError, r"expected .* = \(2, Q, 3, 1, P, 2\)"),
    ("sampling_locations", torch.ones(2, 13, 6, 1, 4, 2), ValueError, r"expected .* = \(2, Q, 3, 1, P, 2\)"),
    ("spatial_shapes", [(5, 6), (5, 1)], ValueError, r"= \(2, Q, 3, 2, P, 2\) .* 2 levels in spatial_shapes"),
    ("spatial_shapes", [(5, 6)], ValueError, r"S = 35 rows.*\(5, 6\).*add up to 30"),
    ("spatial_shapes", [(-5, -7)], ValueError, "holds -5"),
    ("spatial_shapes", [(5.0, 7)], TypeError, "holds 5.0 of type float"),
    ("spatial_shapes", [(np.bool_(1), 35)], TypeError, "of type bool"),
    ("spatial_shapes", [torch.tensor([5, 7])], TypeError, "of type Tensor"),
    ("spatial_shapes", [(5, 2**64 + 7)], ValueError, "add up to 92233720368547758115"),
    ("spatial_shapes", [5, 7], TypeError, r"spatial_shapes is \[5, 7\]; expected \(H, W\)"),
    ("spatial_shapes", [], ValueError, "spatial_shapes is empty"),
    ("spatial_shapes", torch.ones(1, 2), TypeError, "spatial_shapes has dtype"),
    ("spatial_shapes", torch.tensor([5, 7]), ValueError, r"shape \(2,\); expected"),
]


@pytest.mark.parametrize(("name", "wrong", "error", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_argument(make_inputs, name, wrong, error, message):
    inputs = make_inputs(dtype=torch.float32)
    names = ("value", "spatial_shapes", "sampling_locations", "attention_weights")
    arguments = dict(zip(names, inputs.arguments, strict=True))
    with pytest.raises(error, match=message):
        ms_deform_attn(**(arguments | {name: wrong}))


def test_direct_call_of_the_operator_is_checked_too(make_inputs):
    """The registered operator, which skips the Python checks, must not read outside its tensors."""
    if not operator_status.compiled:
        pytest.skip("the compiled operator's own checks")
    inputs = make_inputs(dtype=torch.float32)
    value, locations, weights = inputs.leaves
    call = torch.ops.piip.ms_deform_attn
    for arguments, message in (
        ((value, [5, 8], locations, weights), "cover more rows than the 35"),
        ((value, [5, 6], locations, weights), "cover fewer rows than the 35"),
        ((value, [5], locations, weights), "must hold H and W of 1 levels"),
        ((value[0], [5, 7], locations, weights), "value must have 4 dimensions"),
        ((value[:1], [5, 7], locations, weights), "differ in batch or heads"),
        ((value, [5, 7], locations, weights[..., :3]), "differ on axis 4"),
        ((value, [5, 7], locations.double(), weights), "must be float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)
    with pytest.raises(RuntimeError, match="grad_output must have the shape"):
        torch.ops.piip.ms_deform_attn_backward(inputs.grad_output[:, :2], value, [5, 7], locations, weights)


@pytest.mark.skipif(not operator_status.compiled, reason="the compiled operator's own checks")
@pytest.mark.parametrize(
    ("rows", "shapes"),
    [(20, [4, 2**62 + 5]), (16, [2**32, 2**32, 4, 4]), (0, [2**32, 2**32]), (0, [0, 2**62]), (8, [-2, -4])]
    + [(2, [2**31 - 1, 2**31 - 1] * 4 + [1, 2]), (0, [0, 2**31 - 1]), (35, [2**63 - 1, 2**63 - 1])],
    ids=str,
)
def test_sizes_whose_products_overflow(rows, shapes):
    levels = len(shapes) // 2
    value, grad = torch.ones(1, rows, 1, 8), torch.ones(1, 4, 8)
    locations = torch.rand(1, 4, 1, levels, 2, 2)
    sampling = torch.ones(1, 4, 6 * levels)
    given, grid = (value, shapes, locations, locations[..., 0]), (value, shapes, [2, 2], sampling, 2)
    calls = torch.ops.piip
    for call in (
        lambda: calls.ms_deform_attn(*given),
        lambda: calls.ms_deform_attn_backward(grad, *given),
        lambda: calls.deform_attn_grid(*grid),
        lambda: calls.deform_attn_grid_backward(grad, *grid),
    ):
        with pytest.raises(RuntimeError, match=r"sizes of levels|more rows|2\^31 values"):
            call()


@pytest.mark.skipif(not operator_status.compiled, reason="the compiled operator's own checks")
@pytest.mark.parametrize(("query_shape", "points"), [([2**32, 2**32], 1), ([0, 1], 2**62), ([4, 2**62], 0)], ids=str)
def test_queries_and_points_whose_product_overflows(query_shape, points):
    value = torch.ones(1, 6, 4, 8)
    with pytest.raises(RuntimeError, match="product exceeds 63 bits"):
        torch.ops.piip.deform_attn_grid(value, [2, 3], query_shape, torch.ones(1, 0, 0), points)


def test_public_functions_refuse_sizes_that_overflow():
    """NumPy's own product of these is 20."""
    shapes = np.array([[4, 2**62 + 5]])
    with pytest.raises(ValueError, match="add up to 18446744073709551636"):
        ms_deform_attn(torch.ones(1, 20, 1, 8), shapes, torch.rand(1, 4, 1, 1, 2, 2), torch.rand(1, 4, 1, 1, 2))


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy(make_inputs, kind):
    inputs = make_inputs(spatial_shapes=((5, 7), (3, 2)))
    expected = ms_deform_attn(*inputs.arguments)
    for shapes in (np.array(inputs.spatial_shapes, kind), [(kind(5), 7), [3, kind(2)]]):
        assert torch.equal(ms_deform_attn(inputs.value, shapes, inputs.locations, inputs.weights), expected)
    sampling = torch.randn(2, 6, 3 * 3 * 2 * 4, dtype=torch.float64)
    expected = deform_attn_grid(inputs.value, inputs.spatial_shapes, (2, 3), sampling, 4)
    assert torch.equal(deform_attn_grid(inputs.value, shapes, (kind(2), kind(3)), sampling, kind(4)), expected)


def test_module_refuses_widths_that_heads_do_not_divide():
    with pytest.raises(ValueError, match=r"embed_dim=20 with value_ratio=0\.5 gives values of width 10"):
        MSDeformAttn(20, 4, value_ratio=0.5)


def test_module_refuses_odd_reference_points():
    module = MSDeformAttn(8, 2)
    with pytest.raises(ValueError, match="axis of 3; expected 2 for points"):
        module(torch.rand(1, 6, 8), torch.rand(1, 6, 1, 3), torch.rand(1, 6, 8), [(2, 3)])
