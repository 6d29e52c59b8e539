"""Drawn sampling points against the formula: reference point + offset / size of the map that is read."""

import math

import pytest
import torch

from piip_core import InteractionConfig
from piip_core.pyramid import PIIP
from piip_core.visualization import trace_pyramid
from piip_core.visualization.drawing import draw_sampling

HEADS, POINTS = 4, 3


@pytest.fixture
def pyramid(tiny_config):
    interaction = InteractionConfig(num_interactions=2, num_heads=HEADS, num_points=POINTS)
    return PIIP(tiny_config(interaction=interaction)).eval()


@torch.no_grad()
def test_points_and_weights_follow_the_formula(pyramid, randomize, make_scene):
    randomize(pyramid)
    scene = make_scene(query=(70, 50))
    seen = {}
    for name, unit in pyramid.interactions[1].units.items():
        for direction in ("into_low", "into_high"):
            attention = getattr(unit, direction).attn
            attention.register_forward_hook(
                lambda module, inputs, output, key=(name, direction): seen.update({key: (module, *inputs[:2])})
            )
    readings = trace_pyramid(pyramid, scene, interaction=1).readings
    assert [(r.reader, r.source) for r in readings] == [(2, 3), (3, 2), (1, 2), (2, 1)]
    grids = {1: (3, 4), 2: (4, 6), 3: (6, 8)}  # 96 x 128 pixels; a row of half a cell of Branch 2 is cut off
    cells = {1: (1, 2), 2: (2, 3), 3: (3, 4)}
    for reading, key in zip(readings, seen, strict=True):
        module, query, value = seen[key]
        (rows, columns), (height, width) = grids[reading.reader], grids[reading.source]
        assert tuple(query.shape[1:3]) == (rows, columns) and tuple(value.shape[1:3]) == (height, width)
        row, column = cells[reading.reader]
        token = query[0, row, column].double()
        offsets = module.sampling_offsets.weight.double() @ token + module.sampling_offsets.bias.double()
        logits = module.attention_weights.weight.double() @ token + module.attention_weights.bias.double()
        cell = reading.cells.size[0]
        for head in range(HEADS):
            total = sum(math.exp(logits[head * POINTS + point]) for point in range(POINTS))
            for point in range(POINTS):
                index = head * POINTS + point
                x = (column + 0.5) / columns + float(offsets[2 * index]) / width
                y = (row + 0.5) / rows + float(offsets[2 * index + 1]) / height
                expected = (x * width * cell, y * height * cell)
                assert tuple(reading.points[head, point].tolist()) == pytest.approx(expected, abs=2e-4)
                assert float(reading.weights[head, point]) == pytest.approx(math.exp(logits[index]) / total, abs=1e-6)


def test_a_new_model_reads_a_star(pyramid, make_scene):
    """Head h looks along angle 2 pi h / heads; the points lie 1, 2, 3 cells that way, in the larger coordinate."""
    for reading in trace_pyramid(pyramid, make_scene(), interaction=0).readings:
        steps = (reading.points - torch.tensor(reading.at, dtype=torch.float64)) / reading.cells.size[0]
        directions = torch.tensor([(1, 0), (0, 1), (-1, 0), (0, -1)], dtype=torch.float64)  # of 4 heads
        expected = directions[:, None] * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[:, None]
        torch.testing.assert_close(steps, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(reading.weights, torch.full_like(reading.weights, 1 / POINTS), rtol=0, atol=1e-7)


def test_reference_lies_in_the_cell_of_the_query(pyramid, make_scene):
    scene = make_scene(query=(70, 50))
    for reading in trace_pyramid(pyramid, scene).readings:
        asking = {1: 32, 2: 128 / 6, 3: 16}[reading.reader]
        # the cut-off row of Branch 2 shifts what its cells and the others' call the same place, by at most a cell
        assert abs(reading.at[0] - scene.query[0]) <= asking / 2
        assert abs(reading.at[1] - scene.query[1]) <= asking


@torch.no_grad()
def test_regular_attention_reads_all_cells(tiny_config, randomize, make_scene):
    interaction = InteractionConfig(num_interactions=1, num_heads=HEADS, attention="regular", units=("1<-3",))
    pyramid = randomize(PIIP(tiny_config(interaction=interaction))).eval()
    seen = []
    attention = pyramid.interactions[0].units["1_3"].into_low.attn
    attention.register_forward_hook(lambda module, inputs, output: seen.append(inputs[:2]))
    scene = make_scene(query=(70, 50))
    (reading,) = trace_pyramid(pyramid, scene).readings
    query, value = seen[0]
    q = (attention.wq.weight.double() @ query[0, 1, 2].double()).view(HEADS, -1)
    k = (value[0].double() @ attention.wk.weight.double().T).unflatten(-1, (HEADS, -1))
    expected = ((q * k).sum(-1) / math.sqrt(q.shape[-1])).flatten(0, 1).softmax(dim=0).T.unflatten(1, (6, 8))
    assert reading.points is None
    torch.testing.assert_close(reading.weights, expected, rtol=0, atol=1e-6)


def test_figure_has_every_point(pyramid, randomize, make_scene):
    scene = make_scene()
    trace = trace_pyramid(randomize(pyramid), scene)
    figure = draw_sampling(scene, trace, "title")
    panels = figure.axes[: 2 * len(trace.readings)]
    for axes, reading in zip(panels, (*trace.readings, *trace.readings), strict=True):
        drawn = torch.tensor(axes.collections[0].get_offsets().data)
        for point in reading.points.flatten(0, 1):
            assert float((drawn - point).abs().sum(dim=1).min()) < 1e-6
        assert len(drawn) == HEADS * POINTS
