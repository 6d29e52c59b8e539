"""Released models by name, fetched from a stand-in of the hub."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest
import timm
import torch

import piip_core.integrations.timm  # noqa: F401  (registers the classifiers)
from piip_core import DensePIIP, PIIPClassifier, zoo
from piip_core.checkpoints import (
    build_trained,
    fetch_released,
    find_checkpoint,
    load_checkpoint,
    read_checkpoint,
    released,
)
from piip_core.errors import CheckpointError, ConfigError, SaveError
from piip_core.integrations.timm import piip as timm_models
from piip_core.meta import on_meta

NAME = "piip_tiny"
CLASSIFIER, DETECTOR = "piip_tsb_368_192_128", "mask_rcnn_piip_tsb_1120_896_448"
FETCH = """
import dataclasses, json, sys
from piip_core import ClassifierConfig, zoo
from piip_core.checkpoints import fetch_released

config = ClassifierConfig.from_dict(json.loads(sys.argv[2]))
entry = dataclasses.replace(zoo.classification("piip_tsb_368_192_128"), name="piip_tiny", config=config)
zoo._RELEASED_BY_NAME["piip_tiny"] = zoo.Released(
    entry=entry, repository="OpenGVLab/PIIP", file="classification/tiny.pth"
)
print(fetch_released(sys.argv[1]))
"""
SETTINGS = Path(__file__).parents[2] / "data" / "zoo_settings.json"


def downloads(hub):
    return [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]


def test_a_model_and_its_average_are_fetched_converted_and_kept(hub, tiny_release, tmp_path):
    path = fetch_released(NAME)
    assert path == tmp_path / "assets" / "piip" / "released" / NAME / "model.safetensors"
    image = torch.randn(1, 3, 128, 128)
    for ema, want in enumerate(tiny_release.values()):
        model = PIIPClassifier(want.config).eval()
        load_checkpoint(model, NAME, ema=bool(ema))
        torch.testing.assert_close(model(image), want(image), rtol=0, atol=0)
        built = build_trained([want.config], NAME, ema=bool(ema))
        torch.testing.assert_close(built(image), want(image), rtol=0, atol=0)
    assert downloads(hub) == ["/OpenGVLab/PIIP/resolve/main/classification/tiny.pth"]
    size = len(hub.repositories["OpenGVLab/PIIP"]["classification/tiny.pth"])
    assert released.recorded_size(zoo.released(NAME)) == size


def test_timm_takes_it_by_its_name(hub, tiny_release, monkeypatch):
    config, model = tiny_release["model"].config, zoo.released(NAME)
    monkeypatch.setitem(timm_models.MODELS, "piip_test", timm_models._Model(config, config, model.url))
    monkeypatch.setitem(zoo._RELEASED_BY_NAME, "piip_test", model)
    image = torch.randn(1, 3, 128, 128)
    for tag, want in zip(("in1k", "in1k_ema"), tiny_release.values(), strict=True):
        overlay = {"url": model.url, "tag": tag, "num_classes": 7}
        made = timm.create_model("piip_test", pretrained=True, pretrained_cfg_overlay=overlay).eval()
        torch.testing.assert_close(made(image), want(image), rtol=0, atol=0)
    assert len(downloads(hub)) == 1


def test_a_released_detector_gives_its_backbone(hub):
    """With the names and shapes of the published file."""
    hub.release(DETECTOR)
    with on_meta():
        model = DensePIIP(zoo.released(DETECTOR).config)
    model.to_empty(device="cpu")
    load_checkpoint(model, "piip_tsb_1120_896_448")
    state = read_checkpoint(fetch_released(DETECTOR)).state
    key = "pyramid.branches.0.model.patch_embed.proj.weight"
    assert torch.equal(model.state_dict()[key], state[f"backbone.bottom_up.features.{key}"].float())
    assert any(name.startswith("roi_heads.") for name in state)


def test_the_table_names_every_released_row_of_the_public_tables():
    models = zoo.released_models()
    settings = json.loads(SETTINGS.read_text())
    stems = {Path(row["config_file"]).stem: name for name, row in settings.items()}
    for model in models:
        assert model.metrics and zoo.released(model.name) is zoo.released(model.entry.name) is model
        if isinstance(model.entry, zoo.ZooEntry):
            assert stems[Path(model.file).stem] == model.entry.name
            printed = settings[model.entry.name]["published"]["readme"]
            assert set(model.metrics.values()) <= set(printed.values())
    assert len({model.name for model in models}) == len(models) == 39
    assert zoo.find("upernet_piip_h6b_512_192") is zoo.get("piip_h6b_512_192_upernet")
    with pytest.raises(ConfigError, match="close matches are mask_rcnn_piip_tsb_1568_1120_672"):
        zoo.released("mask_rcnn_piip_tsb_1568_1120")


def test_the_table_is_printed(capsys):
    from piip_core.zoo.__main__ import main

    main()
    lines = capsys.readouterr().out.splitlines()
    assert sum("https://huggingface.co/OpenGVLab/PIIP" in line for line in lines) == 39
    assert any(
        line.split()[:2] == ["mask_rcnn_piip_tsb_1568_1120_672", "COCO"] and "box AP 46.5" in line for line in lines
    )


def test_paths_win_and_other_words_are_explained(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(CLASSIFIER).mkdir()
    assert find_checkpoint(CLASSIFIER) == Path(CLASSIFIER)
    assert str(find_checkpoint("run/model")) == "run/model" and str(find_checkpoint("model.pth")) == "model.pth"
    with pytest.raises(CheckpointError, match=r"piip_tsb_368: no such file .* close matches are piip_tsb_368_192_128"):
        find_checkpoint("piip_tsb_368")
    with pytest.raises(CheckpointError, match="is a chat model"):
        fetch_released("piip_llava_clip_bl_512_256_7b")
    assert hub.requests == []


def test_interrupted_and_slowed_down_downloads_go_on(hub, tiny_release):
    """By the hub's client itself: it resumes where it was cut off, and waits as long as it is told to."""
    hub.failures["GET"] = [(429, {"Retry-After": "0"}), 5000]
    fetch_released(NAME)
    assert len(downloads(hub)) == 3


FAILURES = {
    "gated": ({"HEAD": [(403, {"X-Error-Code": "GatedRepo"})]}, "is gated: accept its terms on the hub"),
    "no repository": ({"HEAD": [(401, {"X-Error-Code": "RepoNotFound"})]}, "or it is private: log in"),
    "no file": ({"HEAD": [(404, {"X-Error-Code": "EntryNotFound"})]}, "the hub has no such file"),
    "too often": ({"HEAD": [(429, {"Retry-After": "0"})] * 7}, r"not to be had: .*429"),
    "cut": ({"GET": [10] + [0] * 6}, "peer closed connection"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_failures_are_one_sentence(hub, tiny_release, what, monkeypatch):
    failures, message = FAILURES[what]
    hub.failures |= failures
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's, between its attempts
    with pytest.raises(CheckpointError, match=message) as caught:
        fetch_released(NAME)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{NAME} (https://huggingface.co/OpenGVLab")


def test_what_is_no_checkpoint_is_refused_and_not_recorded(hub, tiny_release):
    content = hub.repositories["OpenGVLab/PIIP"]["classification/tiny.pth"]
    hub.release(NAME, content=b"<html>Bad gateway</html>")
    with pytest.raises(CheckpointError, match="not a complete PyTorch checkpoint"):
        fetch_released(NAME)
    hub.release(NAME, content=content)
    assert fetch_released(NAME).is_file()


def test_other_bytes_than_promised_are_refused(hub, tiny_release, monkeypatch):
    model = zoo.released(NAME)
    for known in {"sha256": "0" * 64}, {"size": 99}:
        monkeypatch.setitem(zoo._RELEASED_BY_NAME, NAME, dataclasses.replace(model, **known))
        with pytest.raises(CheckpointError, match=rf"has {next(iter(known))} .* by the table of released models it is"):
            fetch_released(NAME)
    monkeypatch.setitem(zoo._RELEASED_BY_NAME, NAME, model)
    hub.wrong_etag = "1" * 64
    hub.release("mask_rcnn_vit_b_1024", content=bytes(10))
    with pytest.raises(CheckpointError, match=r"by the hub it is 1111.*: delete this file and fetch it again"):
        fetch_released("mask_rcnn_vit_b_1024")


def test_the_first_download_is_recorded_and_binding(hub, tiny_release, tmp_path):
    path = fetch_released(NAME)
    record = path.parent / "source.json"
    revision = json.loads(record.read_text())["revision"]
    path.unlink()
    hub.repositories["OpenGVLab/PIIP"]["README.md"] = b"a new commit"
    (tmp_path / "hub").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="the hub has no such file, or not any more"):
        fetch_released(NAME)
    assert hub.requests[-1][1] == f"/OpenGVLab/PIIP/resolve/{revision}/classification/tiny.pth"
    (tmp_path / "moved").rename(tmp_path / "hub")
    changed = json.loads(record.read_text())
    changed["files"]["classification/tiny.pth"]["sha256"] = "2" * 64
    record.write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="by the first download it is 2222"):
        fetch_released(NAME)


def test_a_full_disk_is_named(hub, tiny_release, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(released, "hf_hub_download", full)
    with pytest.raises(SaveError, match=r"No space left on device.*free some space"):
        fetch_released(NAME)


def test_the_variables_of_the_hub_client_count(hub, tiny_release, start_python, tmp_path):
    """Endpoint, cache, token and offline mode, and two processes at once."""
    config = json.dumps(tiny_release["model"].config.to_dict())
    environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": "hf_secret"}

    def fetch(*names):
        started = [start_python(FETCH, name, config, **environment) for name in names]
        for process, *_ in started:
            process.join(timeout=120)
        return [[file.read_text() for file in files] for _, *files in started]

    outputs = fetch(NAME, NAME)
    expected = tmp_path / "home" / "assets" / "piip" / "released" / NAME / "model.safetensors"
    assert [output[0].strip() for output in outputs] == [str(expected)] * 2, outputs
    assert len(downloads(hub)) == 1
    assert {token for _, path, token in hub.requests if "/resolve/" in path} == {"Bearer hf_secret"}
    environment["HF_HUB_OFFLINE"] = "1"
    kept, missing = fetch(NAME, DETECTOR)
    assert kept[0].strip() == str(expected) and len(downloads(hub)) == 1
    assert "CheckpointError" in missing[1] and "offline mode is enabled" in missing[1]
