"""Released weights in transformers' models, and what these push to the hub, for which there is a stand-in."""

import pytest
import torch
from huggingface_hub import ModelCard

from piip_core import zoo
from piip_core.integrations.transformers import (
    PIIPBackbone,
    PIIPForImageClassification,
    PIIPModel,
    PIIPTransformersConfig,
)
from piip_core.integrations.transformers.card import make_model_card
from piip_core.meta import on_meta

NAME = "piip_tsb_368_192_128"
PUSH = """
import sys, torch
import piip_core.integrations.transformers as own

for kind in ("PIIPModel", "PIIPForImageClassification", "PIIPBackbone"):
    model = getattr(own, kind).from_pretrained(f"{sys.argv[1]}/{kind}").eval()
    model.push_to_hub(kind)
own.make_image_processor(model.config).push_to_hub("PIIPForImageClassification")
"""
# Where only the package is installed
LOAD = """
import sys
sys.modules["detectron2"] = sys.modules["piip"] = sys.modules["piip_tools"] = None
import torch
import piip_core.integrations.transformers as own
from transformers import AutoImageProcessor

image, found = torch.load(sys.argv[1], weights_only=True), {}
for kind in ("PIIPModel", "PIIPForImageClassification", "PIIPBackbone"):
    model = getattr(own, kind).from_pretrained(f"somebody/{kind}").eval()
    with torch.no_grad():
        found[kind] = model(image, return_dict=False)[0]
print(AutoImageProcessor.from_pretrained("somebody/PIIPForImageClassification").crop_size)
torch.save(found, sys.argv[2])
"""


@pytest.fixture
def run(hub, run_python, tmp_path):
    """Runs code in a process whose hub is the stand-in, with a cache of its own."""

    def run(code, home, *arguments):
        environment = hub.environment(tmp_path / home) | {"HF_TOKEN": "hf_x"}
        done = run_python(code, *map(str, arguments), **environment)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


def test_pushed_models_have_a_card_and_load_where_only_the_package_is(hub, run, tiny_config, randomize, tmp_path):
    config = PIIPTransformersConfig.from_pyramid(tiny_config(), num_labels=5)
    image, want = torch.randn(1, 3, 128, 128), {}
    for kind in (PIIPModel, PIIPForImageClassification, PIIPBackbone):
        model = randomize(kind(config)).eval()
        model.save_pretrained(tmp_path / kind.__name__)
        with torch.no_grad():
            want[kind.__name__] = model(image, return_dict=False)[0]
    run(PUSH, "home", tmp_path)
    for kind in want:
        files = hub.repositories[f"somebody/{kind}"]
        assert {"README.md", "config.json", "model.safetensors"} <= set(files)
        card = ModelCard(files["README.md"].decode())
        assert "does not say what these weights were trained on" in card.text and card.data.base_model is None
        assert card.data.library_name == "transformers" and "| 3        | ViT       | 16 " in card.text
        assert f'{kind}.from_pretrained("somebody/{kind}")' in card.text
    torch.save(image, tmp_path / "image.pth")
    out = run(LOAD, "other", tmp_path / "image.pth", tmp_path / "found.pth")
    assert "128" in out
    torch.testing.assert_close(torch.load(tmp_path / "found.pth", weights_only=True), want, rtol=0, atol=0)


def test_a_card_that_is_there_stays(hub, run, tiny_config, tmp_path):
    PIIPModel(PIIPTransformersConfig.from_pyramid(tiny_config())).save_pretrained(tmp_path / "PIIPModel")
    hub.repositories["somebody/PIIPModel"] = {"README.md": b"---\nlicense: mit\n---\nMine."}
    code = PUSH.replace('"PIIPForImageClassification", "PIIPBackbone"', "").rpartition("\nown.")[0]
    run(code, "home", tmp_path)
    files = hub.repositories["somebody/PIIPModel"]
    assert "model.safetensors" in files and files["README.md"].decode().endswith("Mine.")


@pytest.mark.parametrize(
    ("kind", "name"), [(PIIPForImageClassification, NAME), (PIIPBackbone, "piip_tsb_1120_896_448")]
)
def test_cards_say_what_the_configuration_says(kind, name):
    """FLOPs against the published ones, which for backbones leave merging and maps out."""
    config, entry = PIIPTransformersConfig.from_zoo(name), zoo.find(name)
    config.name_or_path = name
    with on_meta():
        card = make_model_card(kind(config), "somebody/mine")
    assert card.data.base_model == "OpenGVLab/PIIP" and card.data.pipeline_tag.startswith("image-")
    (gflops,) = [float(words[0]) for line in card.text.splitlines() if (words := line.partition(" takes ")[2].split())]
    assert gflops == pytest.approx(17.4, rel=0.01) if kind is PIIPForImageClassification else gflops > 243
    metric = "top-1 82.1" if kind is PIIPForImageClassification else "box AP 43.6, mask AP 38.7"
    assert metric in card.text and f"{entry.image_size} x {entry.image_size} pixels" in card.text


def test_a_released_classifier(tiny_release):
    image = torch.randn(1, 3, 128, 128)
    for ema, want in enumerate(tiny_release.values()):
        model = PIIPForImageClassification.from_released("piip_tiny", ema=bool(ema), num_labels=7)
        assert model.config.name_or_path == "piip_tiny" and not model.training
        torch.testing.assert_close(model(image).logits, want(image), rtol=0, atol=0)
