"""Cascade Mask R-CNN: what differs from Detectron2's, by construction; numbers are proven by the golden cases."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from piip.modeling import published_cascade_mask_rcnn
from piip_core.checkpoints import PublishedNames
from piip_core.meta import on_meta

ROOT = Path(__file__).parents[3]
CHANNELS, CLASSES = 8, 3
SIZE = (96, 128)


@pytest.fixture
def heads():
    """Small cascade heads with random weights."""
    torch.manual_seed(0)
    node = published_cascade_mask_rcnn().roi_heads
    node.num_classes = CLASSES
    node.batch_size_per_image = 16
    for box_head, predictor, mask_head in zip(node.box_heads, node.box_predictors, node.mask_heads, strict=True):
        box_head.input_shape.channels = mask_head.input_shape.channels = CHANNELS
        box_head.fc_dims = [16, 16]
        predictor.input_shape = ShapeSpec(channels=16)
        predictor.test_score_thresh = 0.0
        mask_head.conv_dims = [CHANNELS] * 2
    heads = instantiate(node)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return heads


@pytest.fixture
def batch():
    """Two images with maps, proposals and ground truth; the second has no object."""
    torch.manual_seed(1)
    features = {
        f"p{level}": torch.randn(2, CHANNELS, SIZE[0] // 2**level, SIZE[1] // 2**level) for level in (2, 3, 4, 5)
    }
    corners = torch.rand(2, 30, 2) * torch.tensor([90.0, 60.0])
    proposals = [
        Instances(SIZE, proposal_boxes=Boxes(torch.cat((c, c + 30), dim=1)), objectness_logits=torch.zeros(30))
        for c in corners
    ]
    boxes = torch.tensor([[10.0, 12.0, 50.0, 60.0], [60.0, 20.0, 100.0, 70.0]])
    masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    masks[0, 12:60, 10:50] = masks[1, 20:70, 60:100] = True
    full = Instances(SIZE, gt_boxes=Boxes(boxes), gt_classes=torch.tensor([0, 2]), gt_masks=BitMasks(masks))
    return ImageList(torch.zeros(2, 3, *SIZE), [SIZE, SIZE]), features, proposals, [full, full[[False, False]]]


def run(heads, batch):
    images, features, proposals, targets = batch
    heads.train()
    torch.manual_seed(2)
    with EventStorage() as storage:
        sampled, losses = heads(images, features, proposals, targets)
        return sampled, losses, storage.latest()


def test_every_parameter_learns_although_an_image_is_empty(heads, batch):
    _, losses, _ = run(heads, batch)
    assert len(losses) == 9 and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    without = [name for name, p in heads.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_stage_weights_scale_the_losses_of_their_stage(heads, batch):
    heads.stage_loss_weights = (1.0, 1.0, 1.0)
    _, plain, _ = run(heads, batch)
    heads.stage_loss_weights = (1.0, 0.5, 0.25)
    _, weighted, _ = run(heads, batch)
    for name, loss in plain.items():
        assert weighted[name].item() == pytest.approx(loss.item() * {"0": 1.0, "1": 0.5, "2": 0.25}[name[-1]])


def test_every_stage_samples_anew_and_sees_the_ground_truth_once(heads, batch, monkeypatch):
    seen = []
    sample = type(heads)._sample

    def spy(self, proposals, targets, stage):
        seen.append(sample(self, proposals, targets, stage))
        return seen[-1]

    monkeypatch.setattr(type(heads), "_sample", spy)
    run(heads, batch)
    assert len(seen) == 3 and heads.proposal_append_gt
    truth = batch[3][0].gt_boxes.tensor
    for first, second in seen:
        assert first.is_ground_truth.sum() == 2 and second.is_ground_truth.sum() == 0
        marked = first.proposal_boxes.tensor[first.is_ground_truth]
        assert torch.equal(marked[marked[:, 0].argsort()], truth)
        assert (second.gt_classes == CLASSES).all()
        assert len(first) <= 16


def test_matching_gets_stricter(heads):
    assert [matcher.thresholds[1] for matcher in heads.proposal_matchers] == [0.5, 0.6, 0.7]


@torch.no_grad()
def test_scores_are_the_softmax_of_mean_logits(heads, batch):
    _, features, proposals, _ = batch
    heads.eval()
    stages = heads.run_stages(features, proposals)
    logits = torch.stack([predictions[0] for _, predictions in stages])
    expected, detectron2s = logits.mean(dim=0).softmax(-1), logits.softmax(-1).mean(dim=0)
    assert (expected - detectron2s).abs().max() > 1e-4  # the two rules do differ here
    found = heads.detect(features, proposals)
    known = expected[:, :CLASSES].flatten()
    for instances in found:
        distance = (instances.scores[:, None] - known[None]).abs().amin(dim=1)
        assert distance.max() < 1e-6


@torch.no_grad()
def test_masks_are_mean_probabilities(heads, batch):
    _, features, proposals, _ = batch
    heads.eval()
    found = heads.detect(features, proposals)
    alone = []
    everyone = heads.mask_head
    for head in everyone:
        heads.mask_head = torch.nn.ModuleList([head])
        alone.append([x.pred_masks for x in heads.forward_with_given_boxes(features, found)])
    heads.mask_head = everyone
    for image, instances in enumerate(heads.forward_with_given_boxes(features, found)):
        mean = sum(masks[image] for masks in alone) / 3
        torch.testing.assert_close(instances.pred_masks, mean)
        assert (alone[0][image] - mean).abs().max() > 1e-4


@torch.no_grad()
def test_no_proposals_give_no_detections(heads, batch):
    images, features, proposals, _ = batch
    heads.eval()
    found, _ = heads(images, features, [x[:0] for x in proposals])
    assert [len(x) for x in found] == [0, 0] and found[0].pred_masks.shape == (0, 1, 28, 28)


def test_names_are_those_of_the_conversion():
    with on_meta():
        heads = instantiate(published_cascade_mask_rcnn().roi_heads)
    ours = {f"roi_heads.{name}" for name in heads.state_dict()}
    table = PublishedNames(None, detector="cascade_mask_rcnn")
    assert ours == {name for name in table.shapes() if name.startswith("roi_heads.")}


def test_the_number_of_classes_follows_the_data():
    cfg = LazyConfig.load(str(ROOT / "projects/PIIP/configs/demo/piip_digits_cascade_mask_rcnn.py"))
    cfg.data.num_classes = 7
    model = instantiate(cfg.model)
    assert [p.cls_score.out_features for p in model.roi_heads.box_predictor] == [8, 8, 8]


def test_one_head_per_stage_is_asked_for():
    node = published_cascade_mask_rcnn().roi_heads
    node.stage_loss_weights = [1.0, 0.5]
    with pytest.raises(ValueError, match="2 stage_loss_weights: expected 3"), on_meta():
        instantiate(node)
