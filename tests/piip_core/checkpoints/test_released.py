"""Released models by name, fetched from a stand-in of the hub."""

import dataclasses
import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from piip_core import DensePIIP, PIIPClassifier, zoo
from piip_core.checkpoints import fetch_released, find_checkpoint, load_checkpoint, read_checkpoint, released
from piip_core.errors import CheckpointError, ConfigError, SaveError

NAME = "piip_tsb_368_192_128"
FETCH = "import sys; from piip_core.checkpoints import fetch_released; print(fetch_released(sys.argv[1]))"


def fetch_elsewhere(environment, name=NAME):
    command = [sys.executable, "-c", FETCH, name]
    return subprocess.Popen(command, env=os.environ | environment, stdout=-1, stderr=-1, text=True)


def test_a_classifier_and_its_average_are_fetched_converted_and_kept(hub, tmp_path):
    hub.release(NAME)
    path = fetch_released(NAME)
    assert path == tmp_path / "assets" / "piip" / "released" / NAME / "model.safetensors"
    model = PIIPClassifier(zoo.classification(NAME).config)
    load_checkpoint(model, NAME)
    state = read_checkpoint(path).state
    torch.testing.assert_close(dict(model.state_dict()), {name: tensor.float() for name, tensor in state.items()})
    downloads = [path for method, path, _ in hub.requests if method == "GET"]
    assert downloads == [f"/OpenGVLab/PIIP/resolve/main/{zoo.released(NAME).file}"]
    load_checkpoint(model, NAME, ema=True)
    assert not torch.equal(model.head.classifiers["1"].weight, state["head.classifiers.1.weight"].float())
    assert sum(method == "GET" for method, *_ in hub.requests) == 1
    record = json.loads((path.parent / "source.json").read_text())
    assert len(record["revision"]) == 40 and record["files"][zoo.released(NAME).file]["size"] > 1000
    assert released.recorded_size(zoo.released(NAME)) == record["files"][zoo.released(NAME).file]["size"]


def test_a_backbone_comes_from_its_detector(hub, tmp_path):
    name = "mask_rcnn_piip_tsb_1120_896_448"
    hub.release(name)
    model = DensePIIP(zoo.released(name).config)
    load_checkpoint(model, "piip_tsb_1120_896_448")
    state = read_checkpoint(fetch_released(name)).state
    key = "pyramid.branches.0.model.patch_embed.proj.weight"
    assert torch.equal(model.state_dict()[key], state[f"backbone.bottom_up.{key}"].float())
    assert any(name.startswith("roi_heads.") for name in state)


def test_every_listed_file_has_a_published_number():
    """Names, files and numbers against the recorded rows of the public tables."""
    models = zoo.released_models()
    assert len(models) == 39 and len({model.name for model in models}) == 39
    assert all(model.metrics and zoo.released(model.name) is zoo.released(model.entry.name) for model in models)
    with pytest.raises(ConfigError, match="close matches are mask_rcnn_piip_tsb_1568_1120_672"):
        zoo.released("mask_rcnn_piip_tsb_1568_1120")


def test_paths_win_and_other_words_are_explained(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert find_checkpoint(NAME) == find_checkpoint(str(tmp_path / NAME)).relative_to(tmp_path)
    assert str(find_checkpoint("run/model")) == "run/model" and str(find_checkpoint("model.pth")) == "model.pth"
    with pytest.raises(CheckpointError, match=r"piip_tsb_368: no such file .* close matches are piip_tsb_368_192_128"):
        find_checkpoint("piip_tsb_368")
    with pytest.raises(CheckpointError, match="is a chat model"):
        fetch_released("piip_llava_clip_bl_512_256_7b")
    assert hub.requests == []


def test_interrupted_and_slowed_down_downloads_go_on(hub):
    """By the hub's client itself: it resumes where it was cut off, and waits as long as it is told to."""
    model = hub.release(NAME, content=bytes(1000) + b"none")
    hub.failures["GET"] = [(429, {"Retry-After": "0"}), 500]
    with pytest.raises(CheckpointError, match="not a complete PyTorch checkpoint"):
        fetch_released(NAME)
    assert [method for method, path, _ in hub.requests if path.endswith(model.file)] == ["HEAD", "GET", "GET", "GET"]


FAILURES = {
    "gated": ({"HEAD": [(403, {"X-Error-Code": "GatedRepo"})]}, "is gated: accept its terms on the hub"),
    "no repository": ({"HEAD": [(401, {"X-Error-Code": "RepoNotFound"})]}, "or it is private: log in"),
    "no file": ({"HEAD": [(404, {"X-Error-Code": "EntryNotFound"})]}, "the hub has no such file"),
    "too often": ({"HEAD": [(429, {"Retry-After": "0"})] * 7}, "not to be had: .*429"),
    "cut": ({"GET": [10] + [0] * 5}, "peer closed connection"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_failures_are_one_sentence(hub, what, monkeypatch):
    hub.release(NAME, content=bytes(100))
    failures, message = FAILURES[what]
    hub.failures |= failures
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's, between its attempts
    with pytest.raises(CheckpointError, match=message) as caught:
        fetch_released(NAME)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{NAME} (https://huggingface.co/OpenGVLab")


def test_other_bytes_than_promised_are_refused(hub, monkeypatch, tmp_path):
    model = hub.release(NAME, content=bytes(100))
    for known, kind in ({"sha256": "0" * 64}, "sha256"), ({"size": 99}, "size"):
        changed = dataclasses.replace(model, **known)
        monkeypatch.setitem(zoo._RELEASED_BY_NAME, NAME, changed)
        with pytest.raises(CheckpointError, match=rf"has {kind} .* by the table of released models it is"):
            fetch_released(NAME)
    monkeypatch.setitem(zoo._RELEASED_BY_NAME, NAME, model)
    hub.repositories[model.repository][model.file] = bytes(101)
    hub.wrong_etag = "1" * 64
    with pytest.raises(CheckpointError, match=r"by the hub it is 1111.*: delete this file and fetch it again"):
        fetch_released(NAME)


def test_the_first_download_is_recorded_and_binding(hub, tmp_path):
    model = hub.release(NAME)
    path = fetch_released(NAME)
    revision = json.loads((path.parent / "source.json").read_text())["revision"]
    path.unlink()
    hub.repositories[model.repository]["README.md"] = b"a new commit"
    (tmp_path / "hub").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="the hub has no such file, or not any more"):
        fetch_released(NAME)
    assert f"/OpenGVLab/PIIP/resolve/{revision}/{model.file}" in {path for _, path, _ in hub.requests}
    (tmp_path / "moved").rename(tmp_path / "hub")
    record = json.loads((path.parent / "source.json").read_text())
    record["files"][model.file]["sha256"] = "2" * 64
    (path.parent / "source.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="by the first download it is 2222"):
        fetch_released(NAME)


def test_a_full_disk_is_named(hub, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(released, "hf_hub_download", full)
    with pytest.raises(SaveError, match=r"No space left on device.*free some space"):
        fetch_released(NAME)


def test_the_variables_of_the_hub_client_count(hub, tmp_path):
    """Endpoint, cache, token and offline mode, and two processes at once."""
    hub.release(NAME)
    environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": "hf_secret"}
    outputs = [process.communicate() for process in [fetch_elsewhere(environment) for _ in range(2)]]
    expected = tmp_path / "home" / "assets" / "piip" / "released" / NAME / "model.safetensors"
    assert [output[0].strip() for output in outputs] == [str(expected)] * 2, outputs
    assert sum(method == "GET" for method, *_ in hub.requests) == 1
    assert {token for *_, token in hub.requests} == {"Bearer hf_secret"}
    asked = len(hub.requests)
    offline = [fetch_elsewhere(environment | {"HF_HUB_OFFLINE": "1"}, name) for name in (NAME, "vit_b_1024")]
    kept, missing = [process.communicate() for process in offline]
    assert kept[0].strip() == str(expected) and len(hub.requests) == asked
    assert "CheckpointError" in missing[1] and "offline mode is enabled" in missing[1]
