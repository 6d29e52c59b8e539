"""The published training rules against a literal re-computation."""

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import instantiate
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import EventStorage

from piip.modeling.rcnn import BestBoxMatcher, TwoSidedBox2BoxTransform, published_mask_rcnn, weights_from_stds


def literal_assignment(quality, positive, negative, minimum):
    """The rule in words: threshold, then every ground truth in order takes its best boxes."""
    matches, labels = [], []
    for column in quality.T:
        best = column.max().item()
        matches.append(column.argmax().item())
        labels.append(1 if best >= positive else 0 if best < negative else -1)
    for truth, row in enumerate(quality):
        if row.max() >= minimum:
            for box in range(quality.shape[1]):
                if row[box] == row.max():
                    matches[box], labels[box] = truth, 1
    return torch.tensor(matches), torch.tensor(labels, dtype=torch.int8)


@pytest.mark.parametrize("seed", range(5))
def test_matcher(seed):
    generator = torch.Generator().manual_seed(seed)
    quality = (torch.rand(4, 30, generator=generator, dtype=torch.float64) * 10).round() / 10  # many ties
    quality[3] *= 0.2  # below the minimum
    matches, labels = BestBoxMatcher([0.3, 0.7], [0, -1, 1], min_quality=0.3)(quality)
    expected_matches, expected_labels = literal_assignment(quality, 0.7, 0.3, 0.3)
    assert torch.equal(labels, expected_labels)
    assert torch.equal(matches[labels > 0], expected_matches[labels > 0])


@pytest.mark.parametrize("min_quality", [None, 0.3])
def test_matcher_without_ground_truth(min_quality):
    matches, labels = BestBoxMatcher([0.5], [0, 1], min_quality)(torch.zeros(0, 7))
    assert matches.shape == labels.shape == (7,) and labels.sum() == 0


def test_box_coding_differs_from_detectron2s_only_below_the_clamp():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(50, 2, generator=generator) * 100
    boxes = torch.cat((corners, corners + 10 + torch.rand(50, 2, generator=generator) * 50), dim=1)
    deltas = (torch.randn(50, 8, generator=generator) * 10).clamp(min=-20)  # -20 / 5 is just above the clamp
    weights = weights_from_stds((0.1, 0.1, 0.2, 0.2))
    assert weights == (10.0, 10.0, 5.0, 5.0)
    stock = Box2BoxTransform(weights).apply_deltas(deltas, boxes)
    ours = TwoSidedBox2BoxTransform(weights).apply_deltas(deltas, boxes)
    torch.testing.assert_close(ours, stock)
    deltas[:, [2, 7]] = -1000.0
    ours = TwoSidedBox2BoxTransform(weights).apply_deltas(deltas, boxes)
    torch.testing.assert_close(ours[:, 2] - ours[:, 0], (boxes[:, 2] - boxes[:, 0]) * 16 / 1000, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours[:, 7] - ours[:, 5], (boxes[:, 3] - boxes[:, 1]) * 16 / 1000, rtol=1e-3, atol=1e-4)


@pytest.fixture
def rpn():
    config = published_mask_rcnn().proposal_generator
    config.head.in_channels = 4
    config.in_features = ["p4"]
    config.anchor_generator.sizes, config.anchor_generator.strides = [[32]], [16]
    config.pad_divisor = 64
    torch.manual_seed(0)
    return instantiate(config)


def image_and_targets(size, boxes):
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes))
    return instances


def test_anchors_of_padding_and_beyond_the_border_take_no_part(rpn):
    anchors = rpn.anchor_generator([torch.zeros(1, 4, 8, 8)])
    targets = [
        image_and_targets((50, 60), [[5.0, 5.0, 40.0, 40.0]])
    ]  # alone padded to 64 x 64, in a batch to 128 x 128
    labels, _ = rpn.label_and_sample_anchors(anchors, targets)
    centres = anchors[0].get_centers()
    assert (labels[0][(centres >= 63).any(dim=1)] == -1).all()
    assert (labels[0][(centres < 63).all(dim=1)] >= 0).any()
    rpn.anchor_boundary_thresh = 0
    labels, _ = rpn.label_and_sample_anchors(anchors, targets)
    assert (labels[0][~anchors[0].inside_box((50, 60))] == -1).all()
    # the best anchor among those inside is positive, whatever lies outside
    inside = anchors[0].inside_box((50, 60))
    best = pairwise_iou(targets[0].gt_boxes, anchors[0])[0].masked_fill(~inside, -1).argmax()
    assert labels[0][best] == 1


def test_losses_are_divided_by_what_was_sampled(rpn):
    rpn.train()
    features = {"p4": torch.randn(2, 4, 4, 4)}
    images = ImageList(torch.zeros(2, 3, 64, 64), [(64, 64), (50, 40)])
    targets = [image_and_targets(size, [[4.0, 4.0, 44.0, 40.0]]) for size in images.image_sizes]
    with EventStorage():
        _, losses = rpn(images, features, targets)
        anchors = rpn.anchor_generator([features["p4"]])
        labels, _ = rpn.label_and_sample_anchors(anchors, targets)
    logits = rpn.rpn_head([features["p4"]])[0][0].permute(0, 2, 3, 1).flatten(1)
    labels = torch.stack(labels)  # fewer anchors than 256, so nothing is drawn at random
    used = labels >= 0
    assert used.sum() < rpn.batch_size_per_image
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[used], labels[used].float())
    torch.testing.assert_close(losses["loss_rpn_cls"], expected)
