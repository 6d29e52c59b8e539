"""The template of the model card: metadata that the hub reads, and code that runs."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from llava_piip.inference import ChatModel

TEMPLATE = Path(__file__).parents[2] / "docs" / "model_card.md"


@pytest.fixture
def card():
    return TEMPLATE.read_text()


def test_the_hub_reads_the_filled_metadata(card):
    filled = card.replace("TEXTVQA_SCORE", "58.2").replace("MODEL_NAME", "mine").replace("LICENSE_ID", "llama2")
    data = ModelCard(filled).data
    assert (data.license, data.pipeline_tag, data.library_name) == ("llama2", "image-text-to-text", "transformers")
    (result,) = data.eval_results
    assert (data.model_name, result.dataset_type, result.metric_value) == ("mine", "textvqa", 58.2)


def test_its_code_answers(card, model_folder, pictures, tmp_path):
    pictures[0].save(tmp_path / "photo.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace("REPOSITORY", str(model_folder)).replace("photo.jpg", str(tmp_path / "photo.jpg"))
    names = {}
    exec(code.replace("max_new_tokens=128", "max_new_tokens=6"), names)
    chat = ChatModel(names["model"], names["processor"])
    stream = chat.stream(names["messages"], [Image.open(tmp_path / "photo.jpg")], max_new_tokens=6)
    assert names["answer"].strip() == "".join(stream).strip() != ""
