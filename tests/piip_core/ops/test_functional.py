"""The operator's numbers: against grid_sample in float64, against transformers, against finite differences."""

import itertools

import pytest
import torch

from piip_core.ops import ms_deform_attn, ms_deform_attn_reference, operator_status
from piip_tools.timing import limited_threads

SHAPES = ((5, 7), (3, 2), (1, 4))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)
on_every_device = pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())


def assert_close(actual, expected, dtype, what):
    """The largest difference, relative to the largest expected number, stays below the tolerance of the dtype."""
    assert actual.shape == expected.shape, what
    if expected.numel():
        error = (actual.double().cpu() - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
        assert error < TOLERANCE[dtype], f"{what}: {error:.2e}"


def run(function, inputs, *arguments):
    """Output and gradients of value, locations and weights."""
    output = function(*arguments)
    return output, *torch.autograd.grad(output, inputs.leaves, inputs.grad_output.to(output.dtype))


def expected_of(inputs):
    double = inputs.to(torch.float64).require_grad()
    return run(ms_deform_attn_reference, double, double.value, double.flat_shapes, double.locations, double.weights)


def check_against_float64(inputs, what=""):
    dtype = inputs.value.dtype
    actual = run(ms_deform_attn, inputs, *inputs.arguments)
    for name, ours, theirs, leaf in zip(
        ("output", "grad value", "grad locations", "grad weights"),
        actual,
        expected_of(inputs),
        (inputs.value, *inputs.leaves),
        strict=True,
    ):
        assert ours.dtype == leaf.dtype
        # Gradients of locations and weights are float32 sums over products of rounded numbers: held to float32.
        exact = name in ("grad locations", "grad weights") and dtype != torch.float64
        assert_close(ours, theirs, torch.float32 if exact else dtype, f"{name} {what}")


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [4, 6, 12, 24, 32, 40, 100])
def test_matches_float64_reference(make_inputs, width, dtype, device):
    for heads, levels, points, batch in itertools.product((1, 6, 16), (1, 3), (1, 4), (1, 2, 3)):
        inputs = make_inputs(batch, heads, width, 5, SHAPES[:levels], points, dtype, device).require_grad()
        check_against_float64(inputs, f"D={width} M={heads} L={levels} P={points} B={batch}")


@on_every_device
@pytest.mark.parametrize("width", [1, 3, 7, 8, 9, 71])
def test_any_width(make_inputs, width, device):
    inputs = make_inputs(width=width, spatial_shapes=SHAPES, dtype=torch.float32, device=device)
    check_against_float64(inputs.require_grad())


def test_many_samples_per_query(make_inputs):
    """More samples in one query than the CPU kernel takes at a time."""
    check_against_float64(make_inputs(heads=8, points=100, spatial_shapes=SHAPES, queries=3).require_grad())


def test_many_queries_in_several_threads(make_inputs):
    """Enough work for the kernels to be split, with image boundaries inside the parts."""
    inputs = make_inputs(3, 5, 12, 701, ((30, 40),), dtype=torch.float32).require_grad()
    check_against_float64(inputs)
    results = []
    for threads in (1, 2, 3):
        with limited_threads(threads):
            results.append(run(ms_deform_attn, inputs, *inputs.arguments))
    if operator_status.compiled:  # every number is summed by one thread, in one order
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_forked_workers_of_a_data_loader(make_inputs):
    """After the operator ran in several threads of the parent; the workers have one thread each."""
    inputs = make_inputs(3, 5, 12, 701, ((30, 40),), dtype=torch.float32)
    with limited_threads(2):
        expected = ms_deform_attn(*inputs.arguments)
        loader = torch.utils.data.DataLoader(
            range(4),
            num_workers=2,
            collate_fn=lambda _: ms_deform_attn(*inputs.arguments),
            multiprocessing_context="fork",
            timeout=60,
        )
        assert all(torch.equal(result, expected) for result in loader)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_contiguous_inputs(make_inputs, dtype):
    inputs = make_inputs(dtype=dtype)
    dense = run(ms_deform_attn, inputs.require_grad(), *inputs.arguments)
    inputs.value = inputs.value.detach().transpose(1, 2).contiguous().transpose(1, 2)
    inputs.locations = inputs.locations.detach().flip(-1).contiguous().flip(-1)[..., [0, 1]].expand_as(inputs.locations)
    inputs.weights = torch.stack((inputs.weights.detach(),) * 2, dim=-1)[..., 0]
    inputs.grad_output = inputs.grad_output.transpose(0, 1).contiguous().transpose(0, 1)
    assert not inputs.value.is_contiguous() and not inputs.weights.is_contiguous()
    strided = run(ms_deform_attn, inputs.require_grad(), *inputs.arguments)
    assert all(torch.equal(a, b) for a, b in zip(dense, strided, strict=True))


def test_gradient_of_an_expanded_output(make_inputs):
    """sum() sends back an expanded scalar as gradient: strides 0."""
    inputs = make_inputs().require_grad()
    summed = torch.autograd.grad(ms_deform_attn(*inputs.arguments).sum(), inputs.leaves)
    inputs.grad_output = torch.ones_like(inputs.grad_output)
    assert all(
        torch.equal(a, b) for a, b in zip(summed, run(ms_deform_attn, inputs, *inputs.arguments)[1:], strict=True)
    )


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_borders(dtype, device):
    """One pixel of value 8: a location reads it with the bilinear hat of its distance from the centre."""
    value = torch.full((1, 1, 1, 1), 8.0, dtype=dtype, device=device)
    read = {0.0: 4, 0.25: 6, 0.5: 8, 0.75: 6, 1.0: 4, -0.25: 2, -0.5: 0, 1.5: 0, -0.51: 0, 1.51: 0, 1e6: 0, -1e6: 0}
    read |= {float("nan"): 0, float("inf"): 0, float("-inf"): 0, 1e30: 0}
    x = torch.tensor(list(read), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    for axis in (0, 1):
        locations = torch.full((1, len(read), 1, 1, 1, 2), 0.5, dtype=x.dtype, device=device)
        locations[0, :, 0, 0, 0, axis] = x
        locations.requires_grad_()
        output = ms_deform_attn(value, [(1, 1)], locations, torch.ones_like(locations[..., 0]))
        assert output.flatten().tolist() == list(read.values())
        output.sum().backward()
        # Exactly half a pixel outside the hat ends, and its slope may be that of either side.
        outside = torch.tensor([result == 0 and place not in (-0.5, 1.5) for place, result in read.items()])
        assert torch.isfinite(locations.grad).all()
        assert (locations.grad[0, outside] == 0).all()


def test_what_is_outside_does_not_touch_the_values():
    """Neither NaN nor infinity in the map leaks into samples that lie outside of it."""
    value = torch.tensor([float("nan"), float("inf")]).view(1, 2, 1, 1).requires_grad_()
    locations = torch.tensor([[-3.0, 0.5], [5.0, 9.0], [float("nan"), 0.5]]).view(1, 3, 1, 1, 1, 2)
    output = ms_deform_attn(value, [(1, 2)], locations, torch.ones(1, 3, 1, 1, 1))
    assert output.tolist() == [[[0.0], [0.0], [0.0]]]
    output.sum().backward()
    assert value.grad.flatten().tolist() == [0.0, 0.0]


def test_half_types_round_once():
    """4097 terms of 1 and 1/4096: a float16 sum would stop growing, a float32 sum is exact before its one rounding."""
    for dtype in (torch.float16, torch.bfloat16):
        points = 4096
        value = torch.ones(1, 1, 1, 1, dtype=dtype)
        locations = torch.full((1, 1, 1, 1, points, 2), 0.5)
        output = ms_deform_attn(value, [(1, 1)], locations, torch.full((1, 1, 1, 1, points), 0.5))
        assert output.item() == points / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_conversion_is_exact(dtype):
    """Every number of the type, subnormals, infinities and NaN included, passes through a sample of weight one."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    value = bits.view(dtype)
    pixels = value.numel()
    x = (torch.arange(pixels, dtype=torch.float64) + 0.5) / pixels
    locations = torch.stack((torch.full_like(x, 0.5), x), dim=-1).float().view(1, pixels, 1, 1, 1, 2)
    # A map one pixel wide: rows are exact in float32, and neighbours have the factor zero, which NaN and infinity
    # do not survive, so these are read apart.
    finite = torch.isfinite(value)
    tame = torch.where(finite, value, torch.zeros((), dtype=dtype)).view(1, pixels, 1, 1)
    output = ms_deform_attn(tame, [(pixels, 1)], locations, torch.ones(1, pixels, 1, 1, 1)).flatten()
    assert torch.equal(output, tame.flatten() + 0)
    wild = value[~finite].view(-1, 1, 1, 1)
    centre = torch.full((len(wild), 1, 1, 1, 1, 2), 0.5)
    output = ms_deform_attn(wild, [(1, 1)], centre, torch.ones(len(wild), 1, 1, 1, 1)).flatten()
    # The three corners outside hold zero and the infinite pixel has factor one, so only NaN stays NaN.
    assert torch.equal(output.nan_to_num(nan=7), wild.flatten().nan_to_num(nan=7)) or not operator_status.compiled


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_rounding_is_to_nearest_even(dtype):
    """Weights carry arbitrary float32 numbers to the output, which must round as PyTorch's own conversion does."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**31), 2**31, (50_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    numbers = numbers.view(torch.float32)
    near = torch.randn(50_000, generator=generator) * 10.0 ** torch.randint(-9, 6, (50_000,), generator=generator)
    numbers = torch.cat(
        (numbers[torch.isfinite(numbers)], near, torch.tensor([65504.0, 65519.9, 65520.0, 2**-25, 0.0]))
    )
    count = len(numbers)
    locations = torch.full((1, count, 1, 1, 1, 2), 0.5)
    value = torch.ones(1, 1, 1, 1, dtype=dtype)
    output = ms_deform_attn(value, [(1, 1)], locations, numbers.view(1, count, 1, 1, 1)).flatten()
    assert torch.equal(output, numbers.to(dtype))


@pytest.mark.parametrize(
    ("sizes", "output_shape"),
    [
        (dict(batch=0), (0, 13, 18)),
        (dict(queries=0), (2, 0, 18)),
        (dict(spatial_shapes=((0, 4),)), (2, 13, 18)),
        (dict(spatial_shapes=((5, 7), (0, 0), (2, 1))), (2, 13, 18)),
        (dict(points=0), (2, 13, 18)),
        (dict(heads=0), (2, 13, 0)),
    ],
    ids=lambda x: str(x),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_every_device
def test_empty(make_inputs, sizes, output_shape, dtype, device):
    inputs = make_inputs(**sizes, dtype=dtype, device=device).require_grad()
    output, *grads = run(ms_deform_attn, inputs, *inputs.arguments)
    assert output.shape == output_shape
    for grad, leaf in zip(grads, inputs.leaves, strict=True):
        assert grad.shape == leaf.shape
        assert torch.isfinite(grad).all()
    if len(inputs.spatial_shapes) == 1:
        assert (output == 0).all()
    else:
        check_against_float64(inputs)


@on_every_device
def test_gradcheck(make_inputs, device):
    for levels, points, width in ((1, 4, 6), (3, 2, 5)):
        inputs = make_inputs(2, 2, width, 3, SHAPES[:levels], points, device=device).require_grad()
        assert torch.autograd.gradcheck(
            lambda v, x, w, shapes=inputs.spatial_shapes: ms_deform_attn(v, shapes, x, w),
            inputs.leaves,
            nondet_tol=1e-12,
        )


@pytest.mark.parametrize("levels", [1, 3])
def test_agrees_with_transformers(make_inputs, levels):
    deformable = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    inputs = make_inputs(2, 4, 6, 11, SHAPES[:levels])
    sizes = torch.tensor(inputs.spatial_shapes)
    start = torch.cat((torch.zeros(1, dtype=torch.long), sizes.prod(1).cumsum(0)[:-1]))
    theirs = deformable.MultiScaleDeformableAttention()(
        inputs.value, sizes, list(inputs.spatial_shapes), start, inputs.locations, inputs.weights, 64
    )
    torch.testing.assert_close(ms_deform_attn(*inputs.arguments), theirs, rtol=1e-12, atol=1e-12)


def test_spatial_shapes_as_tensor(make_inputs):
    inputs = make_inputs(spatial_shapes=SHAPES)
    as_tensor = ms_deform_attn(inputs.value, torch.tensor(SHAPES), inputs.locations, inputs.weights)
    assert torch.equal(as_tensor, ms_deform_attn(*inputs.arguments))


def test_locations_and_weights_of_lower_precision_are_widened(make_inputs):
    inputs = make_inputs(dtype=torch.float32)
    half = ms_deform_attn(inputs.value, inputs.spatial_shapes, inputs.locations.half(), inputs.weights.bfloat16())
    rounded = (inputs.locations.half().float(), inputs.weights.bfloat16().float())
    assert torch.equal(half, ms_deform_attn(inputs.value, inputs.spatial_shapes, *rounded))


def test_second_derivative_is_refused(make_inputs):
    inputs = make_inputs().require_grad()
    grads = torch.autograd.grad(ms_deform_attn(*inputs.arguments).sum(), inputs.leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        sum(grad.sum() for grad in grads).backward()
