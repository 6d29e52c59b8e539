"""The demo without Detectron2."""

import pytest
import torch
from safetensors.torch import load_file

from piip.digit_demo import classifier
from piip.digit_demo.classifier import DigitClassifier, run_classifier


def test_every_branch_learns():
    torch.manual_seed(0)
    model = DigitClassifier()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    logits = model(images)
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    for branch in model.backbone.pyramid.branches:
        assert branch.model.patch_embed.proj.weight.grad.abs().max() > 0


def test_an_interrupted_run_goes_on_as_if_it_was_not(tmp_path, monkeypatch):
    sizes = {"num_train": 128, "num_val": 16}
    run_classifier(tmp_path / "whole", epochs=2, **sizes)
    whole = torch.load(tmp_path / "whole" / "classifier.pth", weights_only=True)

    def stop(*state):
        save(*state)
        raise KeyboardInterrupt

    save = classifier._save
    monkeypatch.setattr(classifier, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        run_classifier(tmp_path / "parts", epochs=2, **sizes)
    monkeypatch.undo()
    drawings = run_classifier(tmp_path / "parts", epochs=2, **sizes)
    parts = torch.load(tmp_path / "parts" / "classifier.pth", weights_only=True)

    assert [entry["loss"] for entry in parts["history"]] == [entry["loss"] for entry in whole["history"]]
    torch.testing.assert_close(parts["model"], whole["model"], rtol=0, atol=0)
    assert all(path.is_file() for path in drawings) and len(drawings) == 2

    state = load_file(tmp_path / "parts" / "backbone.safetensors")
    names = {name: name.replace("backbone.", "backbone.features.", 1) for name in parts["model"]}
    assert state.keys() == {new for old, new in names.items() if not old.startswith("head.")}
    assert all(torch.equal(state[new], parts["model"][old]) for old, new in names.items() if new in state)


def test_learns_a_few_digits_by_heart():
    torch.manual_seed(0)
    images, labels = classifier._make_crops("train", 16)
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    assert (model(images).argmax(dim=1) == labels).float().mean() > 0.9
