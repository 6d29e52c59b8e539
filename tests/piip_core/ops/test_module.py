"""MSDeformAttn: its own promises; outputs and gradients of the published module are among the golden cases."""

import math

import torch

from piip_core.ops import MSDeformAttn, make_reference_points


def test_initial_offsets_form_a_star():
    """Heads look in evenly spread directions; the furthest coordinate of point p is p + 1 pixels away."""
    module = MSDeformAttn(64, 8, num_levels=2, num_points=3)
    offsets = module.sampling_offsets.bias.view(8, 2, 3, 2)
    assert torch.equal(offsets[:, 0], offsets[:, 1])
    torch.testing.assert_close(offsets.abs().amax(-1), torch.tensor([1.0, 2.0, 3.0]).expand(8, 2, 3))
    angles = torch.atan2(offsets[..., 1], offsets[..., 0])[:, 0, 0] % (2 * math.pi)
    torch.testing.assert_close(angles, torch.arange(8) * (math.pi / 4), atol=1e-5, rtol=0)
    assert (module.sampling_offsets.weight == 0).all()
    assert (module.attention_weights.weight == 0).all() and (module.attention_weights.bias == 0).all()


def test_initial_module_averages_the_points_around_the_reference():
    """With identity projections, weights are uniform, so a linear ramp is read at its mean offset."""
    module = MSDeformAttn(4, 4, num_points=1)
    with torch.no_grad():
        for linear in (module.value_proj, module.output_proj):
            linear.weight.copy_(torch.eye(4))
    ramp = torch.arange(9.0).view(1, 9, 1).expand(1, 9, 4)  # one row of nine pixels
    output = module(torch.zeros(1, 1, 4), torch.tensor([[[[0.5, 0.5]]]]), ramp, [(1, 9)])
    # Heads look right, down, left, up by one pixel; above and below the row is nothing.
    torch.testing.assert_close(output, torch.tensor([[[5.0, 0.0, 3.0, 0.0]]]), atol=1e-5, rtol=0)


def test_reference_points_are_pixel_centres():
    points = make_reference_points(2, 3, dtype=torch.float64)
    assert points.shape == (1, 6, 1, 2)
    expected = [[(x + 0.5) / 3, (y + 0.5) / 2] for y in range(2) for x in range(3)]
    torch.testing.assert_close(points[0, :, 0], torch.tensor(expected, dtype=torch.float64))


def test_one_set_of_reference_points_serves_batch_and_levels():
    module = MSDeformAttn(16, 4, num_levels=2).double()
    generator = torch.Generator().manual_seed(0)
    query, value = (torch.randn(3, n, 16, generator=generator, dtype=torch.float64) for n in (6, 16))
    points = make_reference_points(2, 3, dtype=torch.float64)
    shapes = [(3, 4), (2, 2)]
    shared = module(query, points, value, shapes)
    torch.testing.assert_close(shared, module(query, points.expand(3, 6, 2, 2), value, shapes))


def test_box_references_scale_offsets_by_half_the_box():
    """A box as large as two times num_points pixels of the map moves samples by whole pixels, as points do."""
    module = MSDeformAttn(16, 4).double()
    torch.nn.init.normal_(module.sampling_offsets.weight)
    query, value = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 12, 16, dtype=torch.float64)
    points = torch.rand(2, 5, 1, 2, dtype=torch.float64)
    size = 2 * 4 / torch.tensor([4, 3], dtype=torch.float64)
    boxes = torch.cat((points, size.expand_as(points)), dim=-1)
    torch.testing.assert_close(module(query, boxes, value, [(3, 4)]), module(query, points, value, [(3, 4)]))
