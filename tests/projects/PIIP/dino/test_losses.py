"""Matching and losses at the edges, and of two processes against one; golden cases have their numbers."""

import pytest

pytest.importorskip("detectron2")

import torch

from piip.modeling.dino import DINOCriterion, HungarianMatcher, criterion
from piip.modeling.dino.geometry import Target, inverse_sigmoid

CLASSES, QUERIES = 4, 6
SCALE = torch.tensor([200.0, 100.0, 200.0, 100.0])


def random_boxes(*shape):
    return torch.cat((0.3 + 0.4 * torch.rand(*shape, 2), 0.1 + 0.2 * torch.rand(*shape, 2)), dim=-1)


def make_target(count):
    return Target(torch.randint(CLASSES, (count,)), random_boxes(count), SCALE)


def predictions(layers, images):
    shape = (layers, images, QUERIES)
    return torch.randn(*shape, CLASSES), random_boxes(*shape)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_boxes_without_area_have_finite_costs_and_gradients():
    boxes = torch.tensor([0.5, 0.5, 0.0, 0.0]).repeat(1, 1, QUERIES, 1).requires_grad_()
    target = Target(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.0, 0.0]]), SCALE)
    losses = DINOCriterion(HungarianMatcher())(
        torch.zeros(1, 1, QUERIES, CLASSES), boxes, *(x[0] for x in predictions(1, 1)), [target]
    )
    losses["loss_iou"].backward()
    assert losses["loss_iou"].isfinite() and boxes.grad.isfinite().all()


def test_inverse_sigmoid_is_the_logit_but_for_the_ends():
    x = torch.tensor([-1.0, 0.0, 0.001, 0.3, 0.9, 1.0, 2.0])
    torch.testing.assert_close(inverse_sigmoid(x)[2:5], torch.logit(x[2:5]))
    limit = torch.logit(torch.tensor(1e-3)).item()
    ends = inverse_sigmoid(x)[[0, 1, 5, 6]].tolist()
    assert ends == pytest.approx([limit, limit, -limit, -limit], abs=2e-3)  # log(1e-3) for log(1e-3 / 0.999)


def test_more_boxes_than_queries_leave_some_boxes_out():
    logits, boxes = predictions(1, 1)
    (((queries, rows),),) = HungarianMatcher()(logits, boxes, [make_target(9)])
    assert sorted(queries.tolist()) == list(range(QUERIES)) and len(set(rows.tolist())) == QUERIES


def test_predictions_that_are_not_finite_say_so():
    logits, boxes = predictions(1, 1)
    logits[0, 0, 2, 1] = torch.nan
    with pytest.raises(FloatingPointError, match="training diverged"):
        HungarianMatcher()(logits, boxes, [Target(torch.tensor([1]), random_boxes(1), SCALE)])


def test_the_mean_over_processes_is_the_loss_of_all_images(monkeypatch):
    """Two processes with 5 and 1 boxes: gradients are averaged over them, so the normalisers have to be shared."""
    targets = [make_target(5), make_target(1)]
    logits, boxes = predictions(2, 2)
    judge = DINOCriterion(HungarianMatcher())
    whole = judge(logits, boxes, logits[0], boxes[0], targets)
    monkeypatch.setattr(criterion.comm, "get_world_size", lambda: 2)
    parts = []
    for own, other in ((0, 1), (1, 0)):
        others = torch.tensor([float(len(targets[other].labels)), 0.0])
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts, others=others: counts.add_(others))
        one = slice(own, own + 1)
        parts.append(judge(logits[:, one], boxes[:, one], logits[0, one], boxes[0, one], targets[one]))
    for name, loss in whole.items():
        mean = (parts[0][name] + parts[1][name]) / 2
        torch.testing.assert_close(mean, loss, msg=name)
