"""DINO as a meta-architecture: inputs, outputs, precision, initialisation, configuration."""

from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, ImageList, Instances

from piip.modeling.dino.detector import to_original

CONFIGS = Path(__file__).parents[4] / "projects" / "PIIP" / "configs"


def total(losses):
    return sum(losses.values())


def test_all_losses_come_out_and_every_parameter_learns_although_an_image_is_empty(make_dino, batch):
    model = make_dino().train()
    losses = model(batch)
    names = {
        f"{prefix}loss_{kind}" for prefix in ("interm_", "d0.", "", "d0.dn_", "dn_") for kind in ("cls", "bbox", "iou")
    }
    assert set(losses) == names and all(loss.isfinite() for loss in losses.values())
    total(losses).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_a_batch_without_any_object_trains(make_dino, batch):
    model = make_dino().train()
    losses = model(batch[1:] * 2)
    total(losses).backward()
    assert all(p.grad is not None for p in model.parameters())  # what DistributedDataParallel asks for
    assert all(loss == 0 for name, loss in losses.items() if not name.endswith("loss_cls"))


def test_detections_are_best_first_and_in_the_original_image(make_dino, batch):
    model = make_dino(max_detections=30).eval()
    inputs = {"image": batch[0]["image"], "height": 192, "width": 384}
    with torch.no_grad():
        (found,) = [x["instances"] for x in model([inputs])]
        (small,) = [x["instances"] for x in model([{"image": batch[0]["image"]}])]
    assert len(found) == 30 and found.image_size == (192, 384) and small.image_size == (96, 128)
    assert (found.scores.diff() <= 0).all()
    assert set(found.pred_classes.tolist()) <= set(range(model.num_classes))
    torch.testing.assert_close(found.pred_boxes.tensor, small.pred_boxes.tensor * torch.tensor([3.0, 2.0, 3.0, 2.0]))


def test_no_more_detections_than_queries_times_classes(make_dino, batch):
    model = make_dino(num_queries=4, max_detections=300).eval()
    with torch.no_grad():
        assert len(model(batch)[0]["instances"]) == 4 * model.num_classes


def test_boxes_are_clipped_in_the_resized_image_and_empty_ones_kept(make_dino, monkeypatch):
    model = make_dino(num_queries=2, max_detections=2).eval()
    images = ImageList(torch.zeros(1, 3, 64, 128), [(64, 100)])
    maps = [torch.randn(1, 8, 64 // s, 128 // s) for s in (8, 16, 32)]
    predict = type(model).predict

    def moved(self, *args):
        found = predict(self, *args)
        found.boxes[-1, 0] = torch.tensor([[0.0, 0.5, 0.2, 0.5], [1.5, 0.5, 0.2, 0.5]])  # half outside, all outside
        return found

    monkeypatch.setattr(type(model), "predict", moved)
    with torch.no_grad():
        (found,) = model.detect(maps, images)
    rows = {int(q): box for q, box in zip(found.query, found.pred_boxes.tensor.tolist(), strict=True)}
    assert len(found) == 2
    assert rows.get(0, [0, 16, 10, 48]) == pytest.approx([0, 16, 10, 48])
    assert rows.get(1, [100, 16, 100, 48]) == pytest.approx([100, 16, 100, 48])


def test_each_axis_has_its_factor():
    found = Instances((80, 100), pred_boxes=Boxes(torch.tensor([[10.0, 10.0, 100.0, 80.0]])), scores=torch.ones(1))
    found.pred_classes = torch.zeros(1, dtype=torch.int64)
    moved = to_original(found, {"height": 121, "width": 150})
    assert moved.pred_boxes.tensor[0].tolist() == pytest.approx([15, 15.125, 150, 121])


def test_the_head_computes_in_float32_under_autocast(make_dino, batch):
    model = make_dino().train()
    targets, images = model._targets(batch), model._batch(batch)
    maps = [x.bfloat16() for x in model.backbone(images.tensor).values()]
    torch.manual_seed(0)
    plain = model.losses([x.float() for x in maps], images, targets)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.losses(maps, images, targets)
    assert all(loss.dtype == torch.float32 and torch.equal(loss, mixed[name]) for name, loss in plain.items())


def test_activation_checkpointing_changes_no_gradient(make_dino, batch):
    gradients = []
    for checkpointing in (False, True, "cheap"):
        model = make_dino(use_act_checkpoint=checkpointing).train()
        torch.manual_seed(0)
        total(model(batch)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradient, msg=name)


@pytest.mark.parametrize("label", [-1, 5])
def test_classes_that_the_model_lacks_are_an_error(make_dino, batch, label):
    batch[0]["instances"].gt_classes[1] = label
    with pytest.raises(ValueError, match=r"expected 0 to 4.*data\.num_classes"):
        make_dino().train()(batch)


def test_training_needs_ground_truth(make_dino, batch):
    del batch[1]["instances"]
    with pytest.raises(ValueError, match="'instances' for every image"):
        make_dino().train()(batch)


def test_images_too_small_for_the_queries_are_an_error(make_dino, batch):
    with pytest.raises(ValueError, match="num_queries=900 on maps of"):
        make_dino(num_queries=900).eval()(batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_features": ["res3", "res4"]}, "num_levels=4: expected 3"),
        ({"in_features": ["res3", "res4", "p5"]}, r"expected some of the backbone's \["),
        ({"num_groups": 5}, "must be divisible by num_groups"),
    ],
)
def test_parts_that_do_not_fit_are_an_error(make_dino, changes, message):
    with pytest.raises(ValueError, match=message):
        make_dino(**changes)


def test_a_model_starts_as_published():
    cfg = LazyConfig.load(str(CONFIGS / "demo" / "piip_digits_dino.py"))
    cfg.data.num_classes = 10
    torch.manual_seed(0)
    model = instantiate(cfg.model).train()
    assert all((branch.bias + 4.5951).abs().max() < 1e-4 for branch in model.class_embed)
    assert torch.equal(model.class_embed[0].weight, model.class_embed[-1].weight)
    assert len({id(p) for p in model.class_embed.parameters()}) == 2 * len(model.class_embed)  # copies, not shared
    assert not any(branch.layers[-1].weight.any() or branch.layers[-1].bias.any() for branch in model.bbox_embed)
    transformer = model.transformer
    for table in (transformer.level_embeds, transformer.query_embed.weight, model.label_embed.weight):
        assert abs(table.std() - 1) < 4 * (2 * table.numel()) ** -0.5  # standard errors
    in_proj = transformer.decoder.layers[0].self_attn.in_proj_weight
    bound = (6 / sum(in_proj.shape)) ** 0.5
    assert 0.95 * bound < in_proj.abs().max() <= bound
    assert not transformer.encoder.layers[0].self_attn.sampling_offsets.weight.any()

    # the first boxes are the encoder's proposals
    with torch.no_grad():
        maps = [torch.randn(1, 96, 192 // stride, 192 // stride) for stride in (8, 16, 32)]
        found = model.predict(maps, ImageList(torch.zeros(1, 3, 192, 192), [(192, 192)]))
    sides = found.boxes[-1, 0, :, 2:]
    assert ((sides[:, :, None] - torch.tensor([0.05, 0.1, 0.2, 0.4])).abs().amin(dim=-1) < 1e-5).all()
