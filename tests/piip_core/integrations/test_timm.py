"""The classifiers as timm's models, driven by timm's own functions."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.models._builder as timm_builder
import torch
import torch.nn.functional as F
from timm.data import Mixup, resolve_data_config
from timm.models import FeatureInfo, save_for_hf
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

from checkers import find_cases
from checkers.public_config import classifier_from_public
from piip_core import BranchConfig, ConvNeXtConfig, InteractionConfig, PIIPClassifier, zoo
from piip_core.checkpoints import our_names, to_published
from piip_core.classifier import feature_maps
from piip_core.errors import CheckpointError, ConfigError
from piip_core.integrations.timm import model_names, register_classifier
from piip_core.integrations.timm import piip as integration
from piip_core.meta import on_meta
from piip_core.pyramid import resize_for_branch

SIDE = 96
GOLDENS = Path(__file__).parents[2] / "data" / "goldens"


@pytest.fixture
def image():
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(randomize):
    return randomize(timm.create_model("piip_test", num_classes=5)).eval()


def test_every_classifier_of_the_zoo_is_registered():
    assert set(timm.list_models(module="piip")) == set(model_names())
    assert {entry.name for entry in zoo.classification_entries()} < set(model_names())
    released = {model.name for model in zoo.released_models()}
    for entry in zoo.classification_entries():
        assert timm.is_model_pretrained(entry.name) == (entry.name in released)
        with on_meta():
            model = timm.create_model(entry.name)
        assert model.config == entry.training_config
        data = resolve_data_config({}, model=model)
        assert data["input_size"] == (3, entry.image_size, entry.image_size)
        assert (data["crop_pct"], data["interpolation"]) == (1.0, "bicubic")
        names = dict(model.named_modules())
        assert all(name in names for key in ("first_conv", "classifier") for name in model.pretrained_cfg[key])


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_fresh_classifier_is_the_mean_of_plain_networks(pool, image, randomize):
    """Interactions start as identity, so every branch is timm's VisionTransformer on its own resized image."""
    model = timm.create_model("piip_test", num_classes=5, global_pool=pool).eval()
    randomize(model.pyramid.branches)
    randomize(model.head)
    logits = []
    for number, (branch, factor) in enumerate(zip(model.pyramid.branches, model.pyramid.factors, strict=True), 1):
        net = branch.config.network
        plain = VisionTransformer(
            img_size=branch.config.image_size,
            patch_size=net.patch_size,
            embed_dim=net.embed_dim,
            depth=net.depth,
            num_heads=net.num_heads,
            num_classes=5,
            global_pool=pool,
            fc_norm=False,
        ).eval()
        parts = {"": branch.model, "norm.": model.head.norms[str(number)], "head.": model.head.classifiers[str(number)]}
        plain.load_state_dict({p + key: value for p, part in parts.items() for key, value in part.state_dict().items()})
        logits.append(plain(resize_for_branch(image, factor)))
    torch.testing.assert_close(model(image), torch.stack(logits).mean(0), rtol=1e-5, atol=1e-5)


def test_intermediates_are_the_maps_of_the_pyramid(model, image):
    final, found = model.pyramid.forward_intermediates(image, range(len(model.pyramid.interactions)))
    states, maps = model.forward_intermediates(image)
    assert len(maps) == len(model.feature_info) == 6
    for info, x in zip(model.feature_info, maps, strict=True):
        expected = (final if info["interaction"] is None else found[info["interaction"]])[info["branch"] - 1]
        torch.testing.assert_close(x, expected, rtol=0, atol=0)
        assert x.shape == (2, info["num_chs"], SIDE / info["reduction"], SIDE / info["reduction"])
        assert info["module"] in dict(model.named_modules())
    torch.testing.assert_close(model.forward_head(states), model(image), rtol=0, atol=0)
    last = model.forward_intermediates(image, 1, intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(last[0], maps[-1].flatten(2).mT, rtol=0, atol=0)


def test_norms_and_class_tokens_of_intermediates_are_what_heads_read(model, image):
    final = [i for i, info in enumerate(model.feature_info) if info["final"]]
    options = {"indices": final, "norm": True, "return_prefix_tokens": True, "intermediates_only": True}
    pairs = model.forward_intermediates(image, **options)
    tokens = {model.feature_info[i]["branch"]: pair[1] for i, pair in zip(final, pairs, strict=True)}
    logits = [model.head.classifiers[str(number)](tokens[number][:, 0]) for number in (1, 2, 3)]
    torch.testing.assert_close(torch.stack(logits).mean(0), model(image))
    assert [pair[0].shape[1] for pair in pairs] == [16, 32, 48]


def test_stopping_early_skips_what_follows(model, image):
    calls = []
    for branch in model.pyramid.branches:
        branch.model.blocks[-1].register_forward_hook(lambda *_: calls.append(1))
    _, whole = model.forward_intermediates(image, [0])
    assert len(calls) == 3
    _, early = model.forward_intermediates(image, [0], stop_early=True)
    alone = model.forward_intermediates(image, [0], intermediates_only=True)
    assert len(calls) == 3
    torch.testing.assert_close((early, alone), (whole, whole), rtol=0, atol=0)


def test_features_only_gives_a_pyramid(image):
    model = timm.create_model("piip_test", features_only=True).eval()
    assert isinstance(model, FeatureGetterNet)
    assert model.feature_info.channels() == [16, 32, 48]
    assert model.feature_info.reduction() == [8, 16, 24]
    assert len(model.model.pyramid.interactions) == 2  # all of them, although class tokens would not need the last
    maps = model(image)
    assert [x.shape for x in maps] == [(2, c, SIDE // r, SIDE // r) for c, r in ((16, 8), (32, 16), (48, 24))]
    sum(x.sum() for x in maps).backward()
    assert all(p.grad is not None for p in model.parameters())  # nothing is left that DDP would wait for


def test_a_pyramid_of_your_own_with_a_convnext(image, randomize):
    """Registered by its configuration; its maps of several strides are sorted."""
    config = integration.MODELS["piip_test"].training
    network = ConvNeXtConfig(depths=(1, 1, 1, 1), stage_dims=(8, 16, 24, 32))
    convnext = BranchConfig(network=network, image_size=SIDE, segments=((0, 0), (1, 2), (3, 4), (5, 6)))
    pyramid = dataclasses.replace(
        config.pyramid,
        branches=(config.pyramid.branches[0], convnext),
        interaction=InteractionConfig(num_interactions=4, num_heads=4),
    )
    config = dataclasses.replace(config, pyramid=pyramid, pooling="average")
    register_classifier("piip_test_convnext", config)
    assert timm.create_model("piip_test_convnext").config == config
    with pytest.warns(UserWarning, match="Overwriting piip_test_convnext in registry"):
        register_classifier("piip_test_convnext", config)
    torch.manual_seed(0)
    whole = randomize(timm.create_model("piip_test_convnext")).eval()
    features = timm.create_model("piip_test_convnext", features_only=True, out_indices=(0, 1, 2)).eval()
    assert features.feature_info.reduction() == [4, 8, 16]
    features.model.load_state_dict(whole.state_dict(), strict=False)
    expected = whole.forward_intermediates(image, (0, 1, 2), intermediates_only=True)
    torch.testing.assert_close(features(image), expected, rtol=0, atol=0)


@pytest.mark.parametrize("entry", zoo.entries(), ids=lambda entry: entry.name)
def test_maps_of_every_zoo_model_are_in_the_order_that_timm_wants(entry):
    found = feature_maps(entry.config)
    FeatureInfo(found, out_indices=1)  # asserts
    assert sorted(info["branch"] for info in found if info["final"]) == list(range(1, len(entry.config.branches) + 1))


def test_layer_decay_and_weight_decay_of_timms_optimizers(model):
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    found = {
        parameter: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    # Branch 1 has 4 blocks, so there are 6 layers; each of the 2 blocks of the others counts twice
    expected = {
        "pyramid.branches.0.model.pos_embed": (0.5**5, 0.0),
        "pyramid.branches.2.model.cls_token": (0.5**5, 0.0),
        "pyramid.branches.1.model.patch_embed.proj.weight": (0.5**5, 0.05),
        "pyramid.branches.0.model.blocks.0.mlp.fc1.weight": (0.5**4, 0.05),
        "pyramid.branches.0.model.blocks.3.mlp.fc1.bias": (0.5, 0.0),
        "pyramid.branches.1.model.blocks.0.attn.qkv.weight": (0.5**3, 0.05),
        "pyramid.branches.2.model.blocks.1.norm1.weight": (0.5, 0.0),
        "pyramid.interactions.0.units.2_3.into_low.attn_gamma": (1.0, 0.0),
        "head.classifiers.2.weight": (1.0, 0.05),
    }
    parameters = dict(model.named_parameters())
    assert {name: found[parameters[name]] for name in expected} == expected
    assert len(found) == len(parameters)


def test_training_with_timms_parts_learns(image):
    torch.manual_seed(0)
    np.random.seed(0)  # Mixup's
    image = image + torch.tensor([-1.0, 1.0])[:, None, None, None]
    model = timm.create_model("piip_test", num_classes=2, drop_path_rate=0.0)
    model.set_grad_checkpointing()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-3, weight_decay=0.05, layer_decay=0.9)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=12, warmup_epochs=2, warmup_lr=1e-4)
    ema, mixup = ModelEmaV3(model, decay=0.5), Mixup(mixup_alpha=0.1, cutmix_alpha=1.0, prob=0.5, num_classes=2)
    target, losses = torch.tensor([0, 1]), []
    for epoch in range(12):
        x, soft = mixup(image.clone(), target)
        loss = torch.sum(-soft * F.log_softmax(model(x), dim=-1), dim=-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(epoch + 1)
        ema.update(model)
        losses.append(loss.item())
    assert F.cross_entropy(ema(image), target) < 0.5 * losses[0]


@pytest.mark.parametrize("published", [False, True])
def test_pooling_can_change_and_the_configuration_follows(published, image, randomize):
    model = timm.create_model("piip_test", num_classes=5, published=published).eval()
    randomize(model.pyramid.branches)
    for pool, interactions in (("avg", 2), ("token", 1), ("first_patch", 2), ("token", 1)):
        model.reset_classifier(3, pool)
        assert (model.global_pool, model.num_classes, len(model.pyramid.interactions)) == (pool, 3, interactions)
        again = PIIPClassifier(model.config).eval()
        again.load_state_dict(model.state_dict())
        torch.testing.assert_close(again(image), model(image), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="global_pool='max'"):
        model.reset_classifier(3, "max")
    merged = dataclasses.replace(model.config, head="merged", num_groups=16)
    with pytest.raises(ConfigError, match="a merged head averages"):
        PIIPClassifier(merged).reset_classifier(3, "token")


def test_checkpoints_come_back(model, image, tmp_path):
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "last.pth.tar")
    again = timm.create_model("piip_test", num_classes=5, checkpoint_path=tmp_path / "last.pth.tar").eval()
    torch.testing.assert_close(again(image), model(image), rtol=0, atol=0)
    save_for_hf(model, tmp_path / "saved")
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    torch.testing.assert_close(again(image), model(image), rtol=0, atol=0)
    adapted = timm.create_model(
        "piip_test", pretrained=True, num_classes=3, pretrained_cfg_overlay={"file": str(tmp_path / "last.pth.tar")}
    ).eval()
    assert adapted(image).shape == (2, 3)
    torch.testing.assert_close(adapted.forward_features(image)[0].tokens, model.forward_features(image)[0].tokens)


@pytest.fixture
def released(monkeypatch, randomize):
    """The test model with a released form, and a released file's content: weights and their moving average."""
    training = integration.MODELS["piip_test"].training
    branches = tuple(
        dataclasses.replace(branch, network=dataclasses.replace(branch.network, class_position=False))
        for branch in training.pyramid.branches
    )
    config = dataclasses.replace(
        training, pyramid=dataclasses.replace(training.pyramid, branches=branches), pooling="first_patch"
    )
    monkeypatch.setitem(integration.MODELS, "piip_test", integration._Model(training, config))
    models, content = {}, {"epoch": 19}
    for key in ("model", "model_ema"):
        models[key] = randomize(PIIPClassifier(config)).eval()
        state = models[key].state_dict()
        content[key], report = to_published(state, our_names(config, list(state)))
        report.check()
    return models, content


@pytest.mark.parametrize(("tag", "key"), [("in1k", "model"), ("in1k_ema", "model_ema")])
def test_released_weights_are_converted(released, tag, key, image, monkeypatch):
    models, content = released
    monkeypatch.setattr(timm_builder, "load_state_dict_from_url", lambda url, **_: content)
    overlay = {"url": "https://example.org/released.pth", "tag": tag}
    model = timm.create_model("piip_test", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert model.config.pooling == "first_patch"
    torch.testing.assert_close(model(image), models[key](image), rtol=0, atol=0)
    adapted = timm.create_model("piip_test", pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay).eval()
    torch.testing.assert_close(adapted.forward_features(image)[2].tokens, model.forward_features(image)[2].tokens)
    features = timm.create_model("piip_test", pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(features.eval()(image)[2], model.pyramid(image)[0], rtol=0, atol=0)


@pytest.mark.parametrize("case", find_cases(sorted(GOLDENS.glob("cls3_*.json"))), ids=lambda case: case.name)
def test_weights_of_the_public_implementation_give_its_scores(case, monkeypatch):
    """Recorded by running the public code."""
    state = case.below("state.")
    config = classifier_from_public(case.config, {name: tensor.shape for name, tensor in state.items()})
    monkeypatch.setitem(integration.MODELS, "piip_test", integration._Model(config, config))
    overlay = {"state_dict": {"model": state}, "num_classes": config.num_classes}
    model = timm.create_model("piip_test", pretrained=True, published=True, pretrained_cfg_overlay=overlay).eval()
    scores = model(case.below("input.")["image"]).detach()
    torch.testing.assert_close(
        scores, case.results["output"], rtol=0, atol=case.atol * max(1.0, scores.abs().max().item())
    )


def test_released_weights_that_do_not_fit_are_refused(released, monkeypatch, tmp_path):
    torch.save(released[1], tmp_path / "released.pth")
    overlay = {"file": str(tmp_path / "released.pth")}
    with pytest.raises(CheckpointError, match="released weights need published=True"):
        timm.create_model("piip_test", pretrained=True, pretrained_cfg_overlay=overlay)
    timm.create_model("piip_test", pretrained=True, published=True, pretrained_cfg_overlay=overlay)

    def refuse(url, **_):
        raise pickle.UnpicklingError("Weights only load failed")

    monkeypatch.setattr(timm_builder, "load_state_dict_from_url", refuse)
    with pytest.raises(CheckpointError, match="convert it once with tools"):
        timm.create_model("piip_test", pretrained=True, pretrained_cfg_overlay={"url": "https://example.org/x.pth"})


def test_branches_start_from_their_own_networks(monkeypatch, tmp_path, image):
    """What the configuration names for a branch goes into it and its head."""
    plain = VisionTransformer(img_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=7)
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    config = integration.MODELS["piip_test"].training
    first, second, third = config.pyramid.branches
    second = dataclasses.replace(second, pretrained=str(tmp_path / "plain.pth"))
    pyramid = dataclasses.replace(config.pyramid, branches=(first, second, third))
    config = dataclasses.replace(config, pyramid=pyramid)
    monkeypatch.setitem(integration.MODELS, "piip_test", integration._Model(config, config))
    model = timm.create_model("piip_test", num_classes=7, pretrained_branches=True)
    torch.testing.assert_close(model.pyramid.branches[1].model.cls_token, plain.cls_token, rtol=0, atol=0)
    torch.testing.assert_close(model.head.classifiers["2"].weight, plain.head.weight, rtol=0, atol=0)


def test_arguments_that_users_know():
    model = timm.create_model("piip_test", drop_rate=0.1, drop_path_rate=0.3, img_size=128)
    assert model.head.drop.p == 0.1
    assert {b.config.drop_path_rate for b in model.pyramid.branches} == {0.3}
    assert model.pyramid.config.interaction.drop_path_rate == 0.3
    assert model.eval()(torch.randn(1, 3, 128, 160)).shape == (1, 1000)
    low = timm.create_model("piip_test", num_classes=5, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in low.parameters()} == {("meta", torch.bfloat16)}


def test_grey_images_get_the_sum_of_the_kernels(model, image, tmp_path):
    """As timm adapts pretrained weights, the model sees a grey image as it saw three equal channels."""
    torch.save(model.state_dict(), tmp_path / "rgb.pth")
    overlay = {"file": str(tmp_path / "rgb.pth"), "num_classes": 5}
    grey = timm.create_model("piip_test", pretrained=True, in_chans=1, num_classes=5, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(grey.eval()(image[:, :1]), model(image[:, :1].expand(-1, 3, -1, -1)))
    six = timm.create_model("piip_test", in_chans=6, num_classes=5)
    assert six(torch.cat((image, image), dim=1)).shape == (2, 5)
    with pytest.raises(ConfigError, match="in_chans=0: expected a positive number"):
        timm.create_model("piip_test", in_chans=0)


def test_without_pooling_it_gives_maps(model, image):
    final = [i for i, info in enumerate(model.feature_info) if info["final"]]
    maps = timm.create_model("piip_test", num_classes=0, global_pool="").eval()
    assert [x.shape[1:] for x in maps(image)] == [(48, 4, 4), (32, 6, 6), (16, 12, 12)]
    assert len(maps.pyramid.interactions) == 2 and maps.global_pool == ""
    normed = model.forward_intermediates(image, final, norm=True, intermediates_only=True)
    plain = model.forward_intermediates(image, final, intermediates_only=True)
    with pytest.raises(ConfigError, match="num_classes=5: expected 0 with global_pool=''"):
        model.reset_classifier(5, "")
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(image), normed[::-1])
    assert model.prune_intermediate_layers(final, prune_norm=True) == final
    for found in (model(image), model.forward_features(image), model.forward_intermediates(image)[0]):
        torch.testing.assert_close(found, plain[::-1], rtol=0, atol=0)
    model.reset_classifier(5, "avg")
    assert model(image).shape == (2, 5)
    merged = dataclasses.replace(model.config, head="merged", num_groups=8, num_classes=0)
    merged = PIIPClassifier(merged).eval()
    pooled = merged(image)
    merged.reset_classifier(0, "")
    torch.testing.assert_close(merged(image).mean(dim=(2, 3)), pooled)
