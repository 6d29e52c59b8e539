"""The meta-architecture: names, losses, scores; the evaluator, the parameter groups and the schedule."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.scheduler import CosineLRScheduler

from piip.data.classification import TopKEvaluator
from piip.modeling.classifier import ImageClassifier
from piip.solver import CosineToMinimum, classifier_params
from piip_core import BranchConfig, ClassifierConfig, ConfigError, InteractionConfig, PIIPClassifier, PIIPConfig
from piip_core import ViTConfig as _ViTConfig

NETWORKS = [
    _ViTConfig(embed_dim=dim, depth=2, num_heads=2, pos_grid=g, class_token=True) for dim, g in ((32, 1), (16, 2))
]
PYRAMID = PIIPConfig(
    branches=tuple(BranchConfig(network=n, image_size=s) for n, s in zip(NETWORKS, (16, 32), strict=True)),
    interaction=InteractionConfig(num_interactions=2, num_heads=4, drop_path_rate=0.0),
    merging=None,
)
CONFIG = ClassifierConfig(pyramid=PYRAMID, num_classes=5)
PIXELS = {"pixel_mean": [120.0, 110.0, 100.0], "pixel_std": [60.0, 50.0, 40.0]}


def build(randomize, **kwargs) -> tuple[ImageClassifier, PIIPClassifier]:
    """A model, and what it is without Detectron2."""
    model = randomize(ImageClassifier(CONFIG, **PIXELS, **kwargs))
    plain = PIIPClassifier(CONFIG)
    plain.load_state_dict(model.state_dict())  # names are the same
    return model, plain.eval()


def batch(count: int = 4) -> tuple[list[dict], torch.Tensor]:
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in PIXELS.values())
    return [{"image": image, "label": k % 5} for k, image in enumerate(images)], (images.float() - mean) / std


def test_scores_are_those_of_the_plain_classifier(randomize):
    model, plain = build(randomize)
    inputs, images = batch()
    with torch.no_grad():
        scores = torch.stack([output["scores"] for output in model.eval()(inputs)])
        torch.testing.assert_close(scores, plain(images))
    inputs[1]["image"] = inputs[1]["image"][:, :16]
    with pytest.raises(ValueError, match=r"images of sizes .* expected one size"):
        model(inputs)


@pytest.mark.parametrize("kind", ["labels", "smoothed", "mixup", "binary", "binary mixup"])
def test_losses(randomize, kind):
    """Against formulas of torch's own functions; mixup by its definition from the drawn numbers."""
    mixup = Mixup(mixup_alpha=0.8, label_smoothing=0.1, num_classes=5) if "mixup" in kind else None
    loss = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0) if "binary" in kind else None
    model, plain = build(randomize, mixup=mixup, loss=loss, label_smoothing=0.2 if kind == "smoothed" else 0.0)
    inputs, images = batch()
    labels = torch.tensor([entry["label"] for entry in inputs])
    np.random.seed(3)
    found = model(inputs)["loss_cls"]
    if mixup:
        np.random.seed(3)
        np.random.rand()  # whether to mix at all
        share = np.random.beta(0.8, 0.8)
        images = share * images + (1 - share) * images.flip(0)
        targets = share * F.one_hot(labels, 5) + (1 - share) * F.one_hot(labels.flip(0), 5)
    logits = plain(images)
    if kind == "mixup":
        expected = F.cross_entropy(logits, targets.float(), label_smoothing=0.1)
    elif mixup:  # smoothed, then every class above zero: all
        expected = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    elif loss:
        expected = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 5).float())
    else:
        expected = F.cross_entropy(logits, labels, label_smoothing=0.2 if kind == "smoothed" else 0.0)
    torch.testing.assert_close(found, expected)


def test_random_erasing_comes_before_the_network(randomize):
    model, plain = build(randomize, random_erasing=RandomErasing(probability=1.0, mode="const", device="cpu"))
    inputs, images = batch()
    labels = torch.tensor([entry["label"] for entry in inputs])
    random.seed(1)
    found = model(inputs)["loss_cls"]
    random.seed(1)
    erased = RandomErasing(probability=1.0, mode="const", device="cpu")(images.clone())
    assert (erased == 0).any()
    torch.testing.assert_close(found, F.cross_entropy(plain(erased), labels))


def test_pretrained_branches_bring_their_heads(tmp_path):
    network = VisionTransformer(img_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    first = dataclasses.replace(PYRAMID.branches[0], pretrained=str(tmp_path / "vit.pth"))
    pyramid = dataclasses.replace(PYRAMID, branches=(first, PYRAMID.branches[1]))
    model = ImageClassifier(dataclasses.replace(CONFIG, pyramid=pyramid), **PIXELS)
    assert torch.equal(model.head.classifiers["1"].weight, network.head.weight)
    assert torch.equal(model.pyramid.branches[0].model.blocks[1].attn.qkv.weight, network.blocks[1].attn.qkv.weight)


def test_what_cannot_be_trained_on(randomize):
    mixup = Mixup(num_classes=5)
    model, _ = build(randomize, mixup=mixup)
    with pytest.raises(ConfigError, match=r"3 images per process: expected an even number"):
        model(batch(3)[0])
    inputs = batch()[0]
    inputs[2] = {"image": inputs[2]["image"], "label": 5, "file_name": "a.png"}
    with pytest.raises(ValueError, match=r"a\.png: label 5: expected 0 to 4"):
        model(inputs)
    with pytest.raises(ConfigError, match=r"model.mixup.num_classes=7: expected 5"):
        ImageClassifier(CONFIG, **PIXELS, mixup=Mixup(num_classes=7))


def test_accuracy_counts_every_image_once():
    evaluator = TopKEvaluator()
    scores, labels = torch.randn(50, 10, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 10
    evaluator.reset()
    for start in range(0, 50, 7):
        part = slice(start, start + 7)
        evaluator.process([{"label": int(k)} for k in labels[part]], [{"scores": s} for s in scores[part]])
    ranks = (scores > scores.gather(1, labels[:, None])).sum(1)
    expected = {f"top{k}": 100 * (ranks < k).float().mean().item() for k in (1, 5)}
    assert evaluator.evaluate() == {"classification": pytest.approx(expected)} and expected["top1"] < expected["top5"]
    with pytest.raises(ValueError, match="not numbers"):
        evaluator.process([{"label": 0}], [{"scores": torch.full((3,), torch.nan)}])


def test_parameter_groups(randomize):
    """Branches and their heads have the base rate, interactions ten times it; all decay, or no vectors."""
    model, _ = build(randomize)
    settings = {"base_lr": 1.0, "weight_decay": 0.1, "interaction_lr_ratio": 10.0}
    names = {parameter: name for name, parameter in model.named_parameters()}

    def groups(**kwargs):
        found = classifier_params(model, **settings, **kwargs)
        assert sorted(names[p] for group in found for p in group["params"]) == sorted(names.values())
        return {names[p]: (group["lr"], group["weight_decay"]) for group in found for p in group["params"]}

    for name, (rate, decay) in groups(head_lr_ratio=3.0).items():
        part = name.split(".")[0 if name.startswith("head") else 1]
        assert (rate, decay) == ({"branches": 1.0, "interactions": 10.0, "head": 3.0}[part], 0.1)
    exempt = groups(decay_vectors=False)
    assert exempt["pyramid.branches.0.model.blocks.0.attn.qkv.weight"] == (1.0, 0.1)
    for name in ("blocks.0.attn.qkv.bias", "blocks.0.norm1.weight", "pos_embed", "cls_token"):
        assert exempt[f"pyramid.branches.0.model.{name}"] == (1.0, 0.0)


def test_the_schedule_is_timms_for_every_group():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters, (3e-5, 3e-4), strict=True)])
    reference = CosineLRScheduler(
        optimizer, t_initial=40, lr_min=1e-5, warmup_t=10, warmup_lr_init=1e-6, t_in_epochs=False
    )
    schedule = CosineToMinimum(max_iter=40, warmup_iters=10, warmup_lr=1e-6, min_lr=1e-5)
    for step in range(40):
        reference.step_update(step)
        rates = [base * schedule(step / 40) for base in (3e-5, 3e-4)]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates, rel=1e-9)
    with pytest.raises(ValueError, match="warmup_iters=50: expected 0 to max_iter=40"):
        CosineToMinimum(max_iter=40, warmup_iters=50)
