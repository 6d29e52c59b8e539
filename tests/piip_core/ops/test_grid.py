"""deform_attn_grid: its numbers against float64 and against the unfused operator, and its promises."""

import itertools
import math

import pytest
import torch
from torch.library import opcheck

from piip_core.ops import (
    deform_attn_grid,
    deform_attn_grid_reference,
    make_reference_points,
    ms_deform_attn,
    operator_status,
)
from piip_tools.timing import limited_threads

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)
SHAPES = ((5, 7), (3, 2), (1, 4))
on_every_device = pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())


class Inputs:
    """Arguments of deform_attn_grid and a gradient of its output, exact in every dtype that they are used in.

    Samples lie in and up to two pixels around the maps, at least 1/16 pixel away from the lines through pixel centres:
    there the gradient of an offset jumps, so rounding would decide on which side it is.
    """

    def __init__(
        self,
        batch=2,
        heads=3,
        width=6,
        query_shape=(3, 4),
        shapes=SHAPES[:1],
        points=4,
        dtype=torch.float64,
        sampling_dtype=None,
        device="cpu",
    ):
        generator = torch.Generator().manual_seed(0)
        queries, size = math.prod(query_shape), sum(h * w for h, w in shapes)
        where = (batch, queries, heads, len(shapes), points)
        sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64).view(-1, 1, 2)
        pixel = (torch.rand(*where, 2, generator=generator, dtype=torch.float64) * (sizes + 3)).floor() - 2
        pixel = pixel + 0.25 + 0.5 * torch.rand(*where, 2, generator=generator, dtype=torch.float64)
        centres = make_reference_points(*query_shape, dtype=torch.float64)[:, :, :, None, None]
        offsets = (pixel + 0.5) - centres * sizes
        logits = torch.randn(where, generator=generator, dtype=torch.float64)
        sampling = torch.cat((offsets.flatten(2), logits.flatten(2)), dim=-1)
        value = torch.randn(batch, size, heads, width, generator=generator, dtype=torch.float64)
        grad = torch.randn(batch, queries, heads * width, generator=generator, dtype=torch.float64)
        self.value = value.to(device, dtype).requires_grad_()
        self.sampling = sampling.to(device, dtype if sampling_dtype is None else sampling_dtype).requires_grad_()
        self.grad = grad.to(device, dtype)
        self.shapes, self.query_shape, self.points = shapes, query_shape, points

    @property
    def flat_shapes(self):
        return [size for shape in self.shapes for size in shape]

    def run(self):
        """Output and gradients of value and sampling."""
        output = deform_attn_grid(self.value, self.shapes, self.query_shape, self.sampling, self.points)
        return output, *torch.autograd.grad(output, (self.value, self.sampling), self.grad)

    def expected(self):
        """The same by the reference in float64 on the CPU."""
        leaves = [x.detach().cpu().double().requires_grad_() for x in (self.value, self.sampling)]
        output = deform_attn_grid_reference(leaves[0], self.flat_shapes, self.query_shape, leaves[1], self.points)
        return output, *torch.autograd.grad(output, leaves, self.grad.cpu().double())

    def check(self, what=""):
        names = ("output", "grad value", "grad sampling")
        types = (self.value.dtype, self.value.dtype, self.sampling.dtype)
        for name, dtype, ours, theirs in zip(names, types, self.run(), self.expected(), strict=True):
            assert ours.dtype == dtype and ours.shape == theirs.shape, f"{name} {what}"
            if ours.numel():
                error = (ours.cpu().double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)
                assert error < max(TOLERANCE[dtype], TOLERANCE[self.value.dtype]), f"{name} {what}: {error:.2e}"


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [4, 5, 6, 8, 12, 16, 23, 24, 32, 40, 64, 71, 100, 128])
def test_matches_float64_reference(width, dtype, device):
    for heads, levels, points in ((1, 1, 1), (3, 1, 4), (16, 1, 4), (2, 3, 4), (5, 3, 1), (1, 3, 8), (2, 2, 8)):
        Inputs(2, heads, width, (2, 3), SHAPES[:levels], points, dtype, device=device).check(f"M={heads} L={levels}")


@on_every_device
@pytest.mark.parametrize("batch", [1, 3, 65])
def test_batch(batch, device):
    Inputs(batch, dtype=torch.float32, device=device).check()


@on_every_device
@pytest.mark.parametrize("value_dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("sampling_dtype", DTYPES, ids=str)
def test_sampling_of_another_dtype(value_dtype, sampling_dtype, device):
    Inputs(dtype=value_dtype, sampling_dtype=sampling_dtype, device=device).check()


def test_any_number_of_samples_per_head():
    """The softmax goes over 1 to 96 samples of a head, and a query can have more than the CPU kernel takes at once."""
    for levels, points in itertools.product((1, 2, 3), (1, 2, 3, 4, 5, 8, 16, 32)):
        Inputs(1, 4, 6, (2, 2), SHAPES[:levels], points, torch.float32).check(f"L={levels} P={points}")


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_unfused_operator(dtype, device):
    inputs = Inputs(query_shape=(9, 5), shapes=SHAPES, dtype=dtype, device=device)
    where = (2, 45, 3, 3, 4)
    offsets, logits = inputs.sampling.split((2 * 144 // 4, 36), dim=-1)
    sizes = torch.tensor([(w, h) for h, w in SHAPES], dtype=dtype, device=device).view(-1, 1, 2)
    centres = make_reference_points(9, 5, dtype=dtype, device=device)[:, :, :, None, None]
    locations = centres + offsets.view(*where, 2) / sizes
    weights = logits.view(2, 45, 3, 12).softmax(-1).view(where)
    output = ms_deform_attn(inputs.value, SHAPES, locations, weights)
    unfused = output, *torch.autograd.grad(output, (inputs.value, inputs.sampling), inputs.grad)
    for ours, theirs in zip(inputs.run(), unfused, strict=True):
        tolerance = 100 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def test_non_contiguous_inputs():
    inputs = Inputs(dtype=torch.float32)
    dense = inputs.run()
    inputs.value = inputs.value.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    inputs.sampling = torch.stack((inputs.sampling.detach(),) * 2, dim=-1)[..., 0].requires_grad_()
    inputs.grad = inputs.grad.transpose(0, 1).contiguous().transpose(0, 1)
    assert not any(x.is_contiguous() for x in (inputs.value, inputs.sampling, inputs.grad))
    assert all(torch.equal(a, b) for a, b in zip(dense, inputs.run(), strict=True))


def test_large_and_small_maps_in_turn():
    """More than the memory that the CPU kernels keep from call to call, and less again."""
    for shape in ((9, 8), (300, 320), (9, 8)):
        Inputs(1, 4, 6, (2, 3), (shape,)).check(f"{shape}")


@pytest.mark.parametrize(("batch", "heads"), [(3, 5), (1, 1)])
def test_threads_agree(batch, heads):
    """Every number is summed by one thread in one order, also where threads share a head."""
    inputs = Inputs(batch, heads, 12, (20, 33), ((30, 40),), dtype=torch.float32)
    inputs.check()
    results = []
    for threads in (1, 2, 3, 4):
        with limited_threads(threads):
            results.append(inputs.run())
    if operator_status.compiled:
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def one_pixel(offsets, logits, dtype=torch.float32, value=8.0):
    """A map of one pixel read by one query, so an offset is the distance from the pixel's centre."""
    sampling = torch.tensor([*offsets, *logits], dtype=torch.float64).to(dtype).view(1, 1, -1).requires_grad_()
    leaf = torch.full((1, 1, 1, 1), value, dtype=dtype).requires_grad_()
    return leaf, sampling, deform_attn_grid(leaf, [(1, 1)], (1, 1), sampling, len(logits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_borders_and_what_is_no_number(dtype):
    """The bilinear hat; an offset that is infinite or NaN lies outside, reads zero and has zero gradient."""
    nan, inf = math.nan, math.inf
    read = {0.0: 8, 0.5: 4, -0.75: 2, 1.0: 0, -1.0: 0, 1.5: 0, 1e4: 0, nan: 0, inf: 0, -inf: 0}
    for axis, (place, result) in itertools.product((0, 1), read.items()):
        offset = [0.0, 0.0]
        offset[axis] = place
        leaf, sampling, output = one_pixel(offset, [0.0], dtype)
        assert output.item() == result
        output.sum().backward()
        assert torch.isfinite(sampling.grad).all() and torch.isfinite(leaf.grad).all()
        if abs(place) != 1 and result == 0:
            assert (sampling.grad == 0).all() and (leaf.grad == 0).all()


def test_what_is_outside_does_not_touch_the_values():
    for value in (math.nan, math.inf):
        leaf, _, output = one_pixel([3.0, 0.0, math.nan, 0.0], [0.0, 1.0], value=value)
        assert output.item() == 0.0
        output.sum().backward()
        assert leaf.grad.item() == 0.0


@pytest.mark.parametrize("points", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_logits(points, dtype):
    """As softmax: huge ones do not overflow, -inf is weight zero, NaN and +inf make the head's output NaN."""
    generator = torch.Generator().manual_seed(0)
    offsets = (torch.rand(2 * points, generator=generator) - 0.5).tolist()
    for first in (3e38, 1e4, 88.0, -88.0, -1e4, -3e38, -math.inf, math.nan, math.inf):
        logits = [first, *range(points - 1)]
        leaf, sampling, output = one_pixel(offsets, logits, dtype)
        reference = deform_attn_grid_reference(
            leaf.detach().double(), [1, 1], [1, 1], sampling.detach().double(), points
        )
        torch.testing.assert_close(output.double(), reference, rtol=1e-6, atol=1e-6, equal_nan=True)
        if not math.isfinite(first) and first != -math.inf:
            assert output.isnan().all()
    if points > 1:
        leaf, sampling, output = one_pixel(offsets, [-math.inf] * points, dtype)
        assert output.isnan().all()  # softmax of nothing but -inf


def test_nan_stays_in_its_head_and_query():
    inputs = Inputs(1, 4, 6, (2, 3), dtype=torch.float32)
    with torch.no_grad():
        inputs.sampling[0, 2, 2 * 16 + 5] = math.nan  # a logit of query 2, head 1
    output = deform_attn_grid(inputs.value, inputs.shapes, inputs.query_shape, inputs.sampling, inputs.points)
    expected = torch.zeros(1, 6, 24, dtype=torch.bool)
    expected[0, 2, 6:12] = True
    assert torch.equal(output.isnan(), expected)


def test_softmax_is_accurate():
    """Weights of two samples, one of value 1 and one of nothing, over the whole range of float32's exponent."""
    logits = torch.linspace(-100, 20, 20_001, dtype=torch.float32)
    count = len(logits)
    sampling = torch.zeros(1, count, 6)
    sampling[..., 2] = 9.0  # the second sample lies outside
    sampling[0, :, 4] = logits
    value = torch.ones(1, 1, 1, 1)
    weight = deform_attn_grid(value, [(1, 1)], (1, count), sampling * torch.tensor([0, 0, 1, 1, 1, 1]), 2).flatten()
    # Queries lie beside each other in a map of one pixel: their distance from its centre scales the weight.
    x = (torch.arange(count, dtype=torch.float64) + 0.5) / count - 0.5
    expected = (1 - x.abs()) * torch.sigmoid(logits.double())
    normal = expected > 1e-36
    assert ((weight - expected).abs()[normal] / expected[normal]).max() < 1e-6
    assert (weight[~normal] < 2e-36).all()


@pytest.mark.parametrize(
    "sizes",
    [
        dict(batch=0),
        dict(query_shape=(0, 4)),
        dict(query_shape=(3, 0)),
        dict(shapes=((0, 4),)),
        dict(shapes=((4, 0),)),
        dict(shapes=((5, 7), (0, 0), (2, 1))),
        dict(points=0),
        dict(heads=0),
        dict(width=0),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_every_device
def test_empty(sizes, dtype, device):
    inputs = Inputs(**sizes, dtype=dtype, device=device)
    output, *grads = inputs.run()
    assert all(torch.isfinite(x).all() for x in (output, *grads))
    if len(inputs.shapes) > 1:
        inputs.check()
    else:
        assert (output == 0).all() and all((grad == 0).all() for grad in grads)


@on_every_device
def test_gradcheck(device):
    for levels, points, width in ((1, 4, 6), (3, 2, 5), (2, 4, 3)):
        inputs = Inputs(2, 2, width, (2, 2), SHAPES[:levels], points, device=device)

        def call(value, sampling, inputs=inputs):
            return deform_attn_grid(value, inputs.shapes, inputs.query_shape, sampling, inputs.points)

        assert torch.autograd.gradcheck(call, (inputs.value, inputs.sampling), nondet_tol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    inputs = Inputs(shapes=SHAPES[:2], dtype=dtype)
    arguments = (inputs.flat_shapes, list(inputs.query_shape), inputs.sampling, inputs.points)
    opcheck(torch.ops.piip.deform_attn_grid, (inputs.value, *arguments))
    arguments = (inputs.flat_shapes, list(inputs.query_shape), inputs.sampling.detach(), inputs.points)
    opcheck(torch.ops.piip.deform_attn_grid_backward, (inputs.grad, inputs.value.detach(), *arguments))


def test_compile():
    """One graph, with sizes that change."""
    compiled = torch.compile(deform_attn_grid, fullgraph=True, dynamic=True, backend="aot_eager")
    for query_shape, shapes in (((3, 4), ((5, 7),)), ((4, 2), ((6, 3),))):
        inputs = Inputs(query_shape=query_shape, shapes=shapes, dtype=torch.float32)
        output = compiled(inputs.value, shapes, query_shape, inputs.sampling, 4)
        grads = torch.autograd.grad(output, (inputs.value, inputs.sampling), inputs.grad)
        for actual, expected in zip((output, *grads), inputs.run(), strict=True):
            torch.testing.assert_close(actual, expected)


def test_only_the_inputs_are_saved_for_backward():
    inputs = Inputs(dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        deform_attn_grid(inputs.value, inputs.shapes, inputs.query_shape, inputs.sampling)
    assert {x.data_ptr() for x in saved} == {inputs.value.data_ptr(), inputs.sampling.data_ptr()}


def test_second_derivative_is_refused():
    inputs = Inputs()
    output = deform_attn_grid(inputs.value, inputs.shapes, inputs.query_shape, inputs.sampling)
    grads = torch.autograd.grad(output.sum(), (inputs.value, inputs.sampling), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        sum(grad.sum() for grad in grads).backward()


ERRORS = {
    "sampling is a list": (dict(sampling=[1.0]), TypeError, "sampling is list; expected a torch.Tensor"),
    "sampling of integers": (dict(sampling=torch.ones(2, 12, 36).int()), TypeError, "sampling has dtype torch.int32"),
    "value without heads": (dict(value=torch.ones(2, 35, 18)), ValueError, r"value has shape \(2, 35, 18\); expected"),
    "shapes of another map": (dict(value_shapes=[(5, 6)]), ValueError, r"value_shapes \[\(5, 6\)\] add up to 30"),
    "value_shapes no pairs": (dict(value_shapes=[5, 7]), TypeError, r"value_shapes is \[5, 7\]; expected \(H, W\)"),
    "query_shape no pair": (dict(query_shape=12), TypeError, r"query_shape is \[12\]"),
    "query_shape negative": (dict(query_shape=(-3, -4)), ValueError, "query_shape holds -3"),
    "other grid": (dict(query_shape=(3, 5)), ValueError, r"sampling has shape \(2, 12, 36\); .* = \(2, 15, 36\)"),
    "other points": (dict(num_points=3), ValueError, r"sampling has shape \(2, 12, 36\); .* = \(2, 12, 27\)"),
    "points no number": (dict(num_points=4.0), ValueError, "num_points is 4.0; expected a number of points"),
    "other device": (dict(sampling=torch.ones(2, 12, 36, device="meta")), ValueError, "sampling is on meta, value on"),
}


@pytest.mark.parametrize(("change", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_wrong_arguments(change, error, message):
    inputs = Inputs(dtype=torch.float32)
    arguments = dict(
        value=inputs.value, value_shapes=inputs.shapes, query_shape=inputs.query_shape, sampling=inputs.sampling
    )
    with pytest.raises(error, match=message):
        deform_attn_grid(**(arguments | change))


@pytest.mark.skipif(not operator_status.compiled, reason="the compiled operator is not built")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sampling=torch.ones(2, 12, 35)), "sampling must have the shape"),
        (dict(value_shapes=[5, 8]), "cover more rows than the 35"),
        (dict(value_shapes=[5]), "must hold H and W"),
        (dict(query_shape=[3]), "query_shape must hold"),
        (dict(num_points=-1), "num_points is negative"),
        (dict(sampling=torch.ones(2, 12, 36).double()), "sampling must be float32"),
    ],
    ids=str,
)
def test_the_operator_itself_checks_too(change, message):
    inputs = Inputs(dtype=torch.float32)
    arguments = dict(
        value=inputs.value.detach(),
        value_shapes=inputs.flat_shapes,
        query_shape=list(inputs.query_shape),
        sampling=inputs.sampling.detach(),
        num_points=4,
    )
    with pytest.raises(RuntimeError, match=message):
        torch.ops.piip.deform_attn_grid(**(arguments | change))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.piip.deform_attn_grid_backward(grad_output=inputs.grad, **(arguments | change))
