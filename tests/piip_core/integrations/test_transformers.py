"""PIIP through transformers' own interfaces: Auto classes, files, Trainer, pipeline, UperNet."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from PIL import Image
from timm.data import create_transform
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    pipeline,
)

from piip_core import (
    BEiTConfig,
    BranchConfig,
    ClassifierConfig,
    ConfigError,
    DensePIIP,
    InteractionConfig,
    MergingConfig,
    PIIPClassifier,
    PIIPConfig,
    UserError,
    ViTConfig,
    zoo,
)
from piip_core.integrations.transformers import (
    PIIPBackbone,
    PIIPForImageClassification,
    PIIPModel,
    PIIPTransformersConfig,
    make_image_processor,
)

LABELS = {0: "cat", 1: "dog", 2: "bird"}


def pyramid(*, class_token: bool = True) -> PIIPConfig:
    """A ViT with a class token or in windows, and a ViT or a BEiT, which has buffers that no file holds."""
    vit = ViTConfig(embed_dim=32, depth=2, num_heads=4, pos_grid=2, class_token=class_token)
    if class_token:
        other = BranchConfig(network=ViTConfig(embed_dim=16, depth=2, num_heads=2, class_token=True), image_size=64)
    else:
        beit = BEiTConfig(embed_dim=16, depth=2, num_heads=2, bias_window=2)
        other = BranchConfig(network=beit, image_size=64, window_size=2)
    return PIIPConfig(
        branches=(BranchConfig(network=vit, image_size=32), other),
        interaction=InteractionConfig(num_interactions=2, num_heads=4, drop_path_rate=0.0),
        merging=None,
    )


HEADS = {
    "class token": (dict(), True),
    "first patch": (dict(pooling="first_patch"), True),
    "average": (dict(pooling="average"), False),
    "merged": (dict(head="merged", pooling="average", num_groups=8), False),
}


def classifier_config(head: str = "average", num_classes: int = 3) -> ClassifierConfig:
    options, class_token = HEADS[head]
    return ClassifierConfig(pyramid=pyramid(class_token=class_token), num_classes=num_classes, **options)


@pytest.fixture
def image():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path, randomize):
    """A folder with a classifier and its processor, and the model in it."""
    config = PIIPTransformersConfig.from_classifier(classifier_config(), id2label=LABELS)
    model = randomize(PIIPForImageClassification(config)).eval()
    model.save_pretrained(tmp_path)
    make_image_processor(config).save_pretrained(tmp_path)
    return tmp_path, model


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_classifier_has_the_weights_and_outputs_of_ours(head, image, randomize):
    config = classifier_config(head)
    ours = randomize(PIIPClassifier(config)).eval()
    model = AutoModelForImageClassification.from_config(PIIPTransformersConfig.from_classifier(config)).eval()
    assert type(model) is PIIPForImageClassification and model.config.num_labels == 3
    model.load_state_dict(ours.state_dict())
    output = model(image, output_hidden_states=True)
    assert torch.equal(output.logits, ours(image))
    assert torch.equal(model(image, return_dict=False)[0], output.logits)
    # after every interaction, and at the end
    assert len(output.hidden_states) == len(ours.pyramid.interactions) + 1
    final = ours.forward_features(image)
    for found, state in zip(output.hidden_states[-1], final, strict=True):
        assert torch.equal(found, state.tokens.permute(0, 3, 1, 2))

    base = AutoModel.from_config(model.config).eval()
    assert type(base) is PIIPModel
    base.load_state_dict({k: v for k, v in ours.state_dict().items() if ".classifier" not in k})
    features = base(image)
    assert torch.equal(features.pooler_output, ours.forward_head(final, pre_logits=True))
    assert [x.shape[1] for x in features.feature_maps] == [32, 16] and features.hidden_states is None


@torch.no_grad()
def test_saved_folder_comes_back_through_auto_classes(saved, image):
    folder, model = saved
    expected = model(image).logits
    assert (folder / "model.safetensors").is_file()
    again, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert torch.equal(again(image).logits, expected)  # with BEiT's index table, which the file does not hold
    assert again.config.id2label == LABELS and again.config.label2id == {"cat": 0, "dog": 1, "bird": 2}
    assert again.config.classifier == model.config.classifier
    assert torch.equal(
        AutoModelForImageClassification.from_pretrained(folder, device_map="cpu")(image).logits, expected
    )
    half = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert (half(image).logits.float() - expected).abs().max() < 0.05 * expected.abs().max()

    base, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"])
    maps = base(image).feature_maps
    assert all(torch.equal(a, b) for a, b in zip(maps, model.pyramid(image), strict=True))


@torch.no_grad()
def test_what_a_file_lacks_starts_as_in_a_new_model(saved, image):
    folder, model = saved
    again = AutoModelForImageClassification.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    assert again.config.num_labels == 5
    assert again(image).logits.shape == (2, 5)
    state = model.state_dict()
    for name, tensor in again.state_dict().items():
        if ".classifiers." not in name:
            assert torch.equal(tensor, state[name]), name
        elif name.endswith("bias"):
            assert not tensor.any()
        else:
            assert 0.01 < tensor.std() < 0.03

    backbone, info = PIIPBackbone.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"merging", "feature_pyramid"}
    assert all(torch.isfinite(x).all() and x.std() > 0.01 for x in backbone(image).feature_maps)
    assert torch.equal(backbone.merging.final.weights, torch.ones(len(backbone.merging.final.branches)))
    for name, tensor in model.pyramid.state_dict().items():
        assert torch.equal(backbone.pyramid.state_dict()[name], tensor), name


@torch.no_grad()
def test_backbone_has_the_weights_and_maps_of_ours(tmp_path, image, randomize):
    config = PIIPTransformersConfig.from_pyramid(
        PIIPConfig(**vars(pyramid(class_token=False)) | {"merging": MergingConfig(num_groups=8)}),
        out_features=["stage2", "stage4"],
    )
    ours = randomize(DensePIIP(config.dense)).eval()
    model = AutoBackbone.from_config(config).eval()
    assert type(model) is PIIPBackbone
    model.load_state_dict(ours.state_dict())
    output, expected = model(image, output_hidden_states=True), ours(image)
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(output.feature_maps, expected[1::2], strict=True))
    assert [x.shape[1] for x in output.feature_maps] == model.channels == [32, 32]
    assert model.out_indices == [1, 3]
    model.save_pretrained(tmp_path)
    again = PIIPBackbone.from_pretrained(tmp_path, out_indices=[3])
    assert again.out_features == ["stage4"] and torch.equal(again(image).feature_maps[0], expected[3])


def test_upernet_of_transformers_runs_and_trains_on_it(tmp_path, image):
    backbone = PIIPTransformersConfig.from_pyramid(pyramid(class_token=False))
    config = UperNetConfig(
        backbone_config=backbone, num_labels=4, hidden_size=16, use_auxiliary_head=False, pool_scales=[1, 2]
    )
    model = UperNetForSemanticSegmentation(config)
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    model.train()(image, labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model.eval()(image).logits
        assert expected.shape == (2, 4, 64, 64)
        torch.testing.assert_close(again(image).logits, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [PIIPModel, PIIPForImageClassification, PIIPBackbone])
@torch.no_grad()
def test_offloaded_weights_give_the_same_numbers(kind, image, randomize, tmp_path):
    """To the main memory, and piece by piece to the disk; class tokens and position tables among them."""
    model = randomize(kind(PIIPTransformersConfig.from_classifier(classifier_config("class token")))).eval()
    expected = model(image, return_dict=False)[0]
    places = {name: ("disk", "cpu")[number % 2] for number, (name, _) in enumerate(model.named_children())}
    split = dispatch_model(copy.deepcopy(model), places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    for offloaded in (cpu_offload(model, torch.device("cpu")), split):
        assert next(offloaded.pyramid.parameters()).is_meta
        for found, wanted in zip(offloaded(image, return_dict=False)[0], expected, strict=True):
            assert torch.equal(found, wanted)


def test_gradient_checkpointing_changes_nothing(saved, image):
    _, model = saved
    model.train()
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        if enable:
            # renamed in transformers 5.23
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        assert all(branch.grad_checkpointing is enable for branch in model.pyramid.branches)
        assert model.pyramid.grad_checkpointing is enable
        model(image, labels=torch.tensor([0, 2])).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    assert not model.pyramid.grad_checkpointing


def test_trainer_learns_and_saves_what_pipeline_uses(saved, tmp_path):
    folder, model = saved
    processor = AutoImageProcessor.from_pretrained(folder)
    rows = []
    for index in range(12):  # one bright channel is the class
        pixels = np.full((70, 80, 3), 40, np.uint8)
        pixels[..., index % 3] = 200 + index
        photo = Image.fromarray(pixels)
        rows.append({"pixel_values": processor(photo)["pixel_values"][0], "labels": index % 3, "photo": photo})
    known = {field.name for field in dataclasses.fields(TrainingArguments)}  # renamed in transformers 5.23
    checkpointing = known & {"activation_checkpointing"} or {"gradient_checkpointing"}
    arguments = TrainingArguments(
        output_dir=tmp_path / "run",
        max_steps=12,
        per_device_train_batch_size=6,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        **dict.fromkeys(checkpointing, True),
    )
    fresh = PIIPForImageClassification(model.config)
    trainer = Trainer(fresh, arguments, train_dataset=rows, eval_dataset=rows, processing_class=processor)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    predicted = trainer.predict(rows).predictions
    assert (np.asarray(predicted).argmax(1) == [row["labels"] for row in rows]).all()
    trainer.save_model()
    classify = pipeline("image-classification", model=str(tmp_path / "run"), device="cpu")
    for row in rows[:3]:
        best = classify(row["photo"], top_k=1)[0]
        assert best["label"] == LABELS[row["labels"]] and best["score"] > 0.5


def test_processor_equals_timms_evaluation(saved):
    from skimage import data

    folder, _ = saved
    photo = Image.fromarray(data.chelsea())  # 300 x 451
    transform = create_transform((3, 64, 64), is_training=False, interpolation="bicubic", crop_pct=1.0)
    expected = transform(photo)
    exact = AutoImageProcessor.from_pretrained(folder, backend="pil")(photo)["pixel_values"][0]
    torch.testing.assert_close(torch.as_tensor(exact), expected, rtol=0, atol=1e-6)
    fast = AutoImageProcessor.from_pretrained(folder)(photo, return_tensors="pt")["pixel_values"][0]
    assert (fast - expected).abs().max() < 3 / 255 / 0.224  # resized by other arithmetic: three of 255 levels
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"] == "BitImageProcessor"


def test_configurations_of_the_zoo(tmp_path):
    for entry in zoo.classification_entries():
        config = PIIPTransformersConfig.from_zoo(entry.name)
        config.save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
        assert again.classifier == entry.config and again.image_size == entry.image_size
        assert again.num_labels == 1000 and again.id2label[1].startswith("goldfish")
        assert again.to_json_string() == config.to_json_string()
        training = PIIPTransformersConfig.from_zoo(entry.name, training=True, num_labels=10)
        assert training.classifier == ClassifierConfig.from_dict(entry.training_config.to_dict() | {"num_classes": 10})
    for entry in (zoo.get("piip_tsb_1568_1120_672"), zoo.entries()[-1]):
        assert PIIPTransformersConfig.from_zoo(entry.name).dense == entry.config
    assert PIIPTransformersConfig().num_labels == 2  # transformers' own default
    with pytest.raises(ConfigError, match=r"close matches are .*piip_tsb_368_192_128"):
        PIIPTransformersConfig.from_zoo("piip_tsb_368")


def test_mistakes_are_errors_where_they_are_made(saved, image):
    _, model = saved
    with pytest.raises(UserError, match=r"expected \(batch, 3, height, width\)"):
        model(image[0])
    with pytest.raises(ConfigError, match=r"ClassifierConfig.pooling='class_token': expected 'average'"):
        PIIPTransformersConfig(pyramid=pyramid(class_token=False).to_dict())
    with pytest.raises(ValueError, match="stage5"):
        PIIPTransformersConfig(out_features=["stage5"])
