"""Denoising queries: where noised boxes and labels may lie, and who sees whom."""

import pytest

pytest.importorskip("detectron2")

import torch
from torch import nn

from piip.modeling.dino import ContrastiveDenoising
from piip.modeling.dino.denoising import DenoisingLayout
from piip.modeling.dino.geometry import Target

CLASSES, WIDTH = 50, 8


def target(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 0.4 + 0.2 * torch.rand(count, 2, generator=generator)
    sides = 0.05 + 0.1 * torch.rand(count, 2, generator=generator)  # far from the border: nothing is clamped
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return Target(labels, torch.cat((centres, sides), dim=1), torch.tensor([100.0, 80.0, 100.0, 80.0]))


@pytest.fixture
def queries():
    torch.manual_seed(0)
    targets = [target(40), target(25, seed=1)]
    denoising = ContrastiveDenoising(num_denoising=400, label_noise=0.5, box_noise=0.8)
    return targets, denoising(targets, nn.Embedding(CLASSES, WIDTH))


def corner_moves(targets, found):
    """How far each corner coordinate has moved, in halves of the box's width or height."""
    clean = torch.cat([t.boxes for t in targets])[found.layout.box]

    def corners(boxes):
        return torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), dim=1)

    return (corners(found.boxes) - corners(clean)).abs() / (clean[:, 2:] / 2).repeat(1, 2)


def test_positives_stay_near_and_negatives_go_farther(queries):
    targets, found = queries
    moves, positive = corner_moves(targets, found), found.layout.positive
    assert moves[positive].max() <= 0.8 + 1e-5 and moves[positive].mean() == pytest.approx(0.4, abs=0.03)
    assert moves[~positive].min() >= 0.8 - 1e-5 and moves[~positive].max() <= 1.6 + 1e-5
    assert moves[~positive].mean() == pytest.approx(1.2, abs=0.03)


def test_half_the_label_noise_is_the_share_of_new_labels(queries):
    targets, found = queries
    clean = torch.cat([t.labels for t in targets])[found.layout.box]
    share = (found.labels != clean).float().mean().item()
    assert share == pytest.approx(0.25 * (CLASSES - 1) / CLASSES, abs=0.04)


def test_every_slot_holds_its_box(queries):
    _, found = queries
    layout, sizes = found.layout, [40, 25]
    assert (layout.num_groups, layout.half, layout.size) == (10, 40, 800)
    assert len(layout.slot) == sum(sizes) * 20
    logits = found.box_logits[layout.image, layout.slot].sigmoid()
    torch.testing.assert_close(logits, found.boxes.clamp(1e-3, 1 - 1e-3), atol=1e-4, rtol=1e-4)
    # slots that the second image leaves empty
    empty = torch.ones(2, 800, dtype=torch.bool)
    empty[layout.image, layout.slot] = False
    assert empty[0].sum() == 0 and empty[1].sum() == 15 * 20
    assert not found.content[empty].any() and not found.box_logits[empty].any()


@pytest.mark.parametrize(
    ("counts", "num_denoising", "groups"), [([3, 12], 100, 8), ([101, 4], 100, 1), ([0, 0], 100, 1)]
)
def test_number_of_groups(counts, num_denoising, groups):
    layout = DenoisingLayout.of(counts, num_denoising)
    assert layout.num_groups == groups and layout.size == 2 * groups * max(counts)


@pytest.mark.parametrize(("count", "num_denoising"), [(0, 100), (3, 0)])
def test_without_boxes_or_turned_off_the_labels_still_get_a_gradient(count, num_denoising):
    embedding = nn.Embedding(CLASSES, WIDTH)
    found = ContrastiveDenoising(num_denoising)([target(count)], embedding)
    assert found.content.shape == (1, 0, WIDTH) and found.layout.attention_mask(4).sum() == 0
    found.content.sum().backward()
    assert embedding.weight.grad is not None and not embedding.weight.grad.any()


def test_a_negative_number_is_an_error():
    with pytest.raises(ValueError, match="num_denoising=-1"):
        ContrastiveDenoising(-1)
