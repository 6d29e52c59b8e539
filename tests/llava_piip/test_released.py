"""A released chat model by its name, and one that is pushed, with a stand-in of the hub."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from llava_piip.checkpoints import export_folder, fetch_released
from llava_piip.inference import ChatModel
from llava_piip.inference import model_folder as find_model_folder
from piip_core import zoo
from piip_core.checkpoints import read_checkpoint
from piip_core.errors import CheckpointError

NAME = "piip_llava_tiny"
PUSH = """
import sys
from llava_piip import PIIPLlavaForConditionalGeneration, PIIPLlavaProcessor

for kind in (PIIPLlavaForConditionalGeneration, PIIPLlavaProcessor):
    kind.from_pretrained(sys.argv[1]).push_to_hub("chat")
again = PIIPLlavaForConditionalGeneration.from_pretrained("somebody/chat")
PIIPLlavaProcessor.from_pretrained("somebody/chat")
again.save_pretrained(sys.argv[2])
"""


@pytest.fixture
def released(hub, monkeypatch, tiny_entry, model_folder, tokenizer_folder, tmp_path):
    """The small model in the published form, in the table and in the hub."""
    export_folder(model_folder, tmp_path / "public")
    shutil.copytree(tokenizer_folder, tmp_path / "public", dirs_exist_ok=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / "public").iterdir()}
    hub.repositories["OpenGVLab/tiny"] = {**files, "README.md": b"published", "training_state.pt": b"of no use"}
    entry = tiny_entry()
    object.__setattr__(entry, "name", NAME)
    monkeypatch.setitem(zoo._MULTIMODAL_BY_NAME, NAME, entry)
    monkeypatch.setitem(zoo._RELEASED_BY_NAME, NAME, zoo.Released(entry=entry, repository="OpenGVLab/tiny"))


def test_it_is_fetched_converted_and_kept(hub, released, model_folder, pictures, tmp_path):
    folder = find_model_folder(Path(NAME))
    assert folder == fetch_released(NAME) == tmp_path / "assets" / "piip" / "released" / NAME / "model"
    asked = [path for method, path, _ in hub.requests if "/resolve/" in path]
    assert asked and not any(path.endswith(("README.md", "training_state.pt")) for path in asked)
    messages = [{"role": "user", "content": "<image>\nWhat is it?"}]
    answers = []
    for source in (NAME, model_folder):
        chat = ChatModel.load(source, device="cpu", dtype="float32")
        answers.append("".join(chat.stream(messages, [pictures[0]], max_new_tokens=6)))
    assert answers[0] == answers[1]


def test_other_words_and_other_models_are_explained(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such folder .* close matches are piip_llava_clip_bl_512_256_7b"):
        find_model_folder(Path("piip_llava_clip_bl_512_256"))
    with pytest.raises(CheckpointError, match="is no chat model"):
        fetch_released("piip_tsb_368_192_128")


def test_a_pushed_model_has_a_card_and_loads(hub, run_python, model_folder, tmp_path):
    environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": "hf_x"}
    done = run_python(PUSH, str(model_folder), str(tmp_path / "again"), **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    card = ModelCard(hub.repositories["somebody/chat"]["README.md"].decode())
    assert card.data.pipeline_tag == "image-text-to-text" and "in the vision tower" in card.text
    assert 'PIIPLlavaForConditionalGeneration.from_pretrained("somebody/chat")' in card.text
    states = [dict(read_checkpoint(folder).state) for folder in (model_folder, tmp_path / "again")]
    torch.testing.assert_close(*states, rtol=0, atol=0)
