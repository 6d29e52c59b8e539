"""The files of the chat demo: they load as LLaVA's do, splits share nothing, and they are made whole or not at all."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from llava_piip.conversation import IGNORE_INDEX
from llava_piip.data import ConversationDataset, read_records
from llava_piip.demo import dataset as module
from llava_piip.demo.dataset import imagine_conversations, prepare_chat_dataset
from llava_piip.demo.questions import QUESTION_TYPES, render_chat_scene
from piip_core.errors import UserError

SIZES = {"num_train": 34, "num_val": 8}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return prepare_chat_dataset(tmp_path_factory.mktemp("data") / "digit_chat", **SIZES)


def supervised(tokenizer, labels):
    """The answers that are learned."""
    parts = re.split("-", "".join("-" if label == IGNORE_INDEX else f"{label} " for label in labels.tolist()))
    return [
        tokenizer.decode([int(token) for token in part.split()], skip_special_tokens=True) for part in parts if part
    ]


def test_stage_1_teaches_captions(files, tiny_llava):
    _, processor = tiny_llava
    records = read_records(files.captions)
    assert len(records) == 34 and len({record.images for record in records}) == 34
    samples = ConversationDataset(records, processor, files.image_root, chat_template="plain", max_length=256)
    for record, sample in zip(records, samples, strict=True):
        assert sample["pixel_values"].shape == (1, 3, 64, 64)
        (learned,) = supervised(processor.tokenizer, sample["labels"])
        assert learned.strip() == record.conversations[1]["value"]
        assert re.match(r"a \w+ \d at the (top|bottom) (left|right)", learned.strip())


def test_stage_2_teaches_answers(files, tiny_llava):
    _, processor = tiny_llava
    records = read_records(files.conversations)
    with_image = [record for record in records if record.images]
    assert len(with_image) == 34 and len(records) == 40  # 15 % without
    assert {record.images for record in with_image} == {record.images for record in read_records(files.captions)}
    samples = ConversationDataset(records, processor, files.image_root, chat_template="vicuna_v1", max_length=512)
    learned = []
    for record, sample in zip(records, samples, strict=True):
        assert ("pixel_values" in sample) == bool(record.images)
        answers = [answer.strip() for answer in supervised(processor.tokenizer, sample["labels"])]
        assert answers == [turn["value"] for turn in record.conversations[1::2]] and 3 <= len(answers) <= 5
        learned += answers
    assert [question.answer for question in files.training_questions()] == learned


def test_validation_asks_every_type_about_every_image(files):
    questions = files.validation_questions()
    pictures = [path.relative_to(files.image_root).as_posix() for path in files.images()]
    assert len(pictures) == 8
    for picture in pictures:
        kinds = [question.type for question in questions if question.image == picture]
        assert kinds[-2:] == ["where", "colour"] and kinds[:-2] in (["which", "count"], ["count", "sum"], ["count"])
    assert {question.type for question in questions} == set(QUESTION_TYPES) - {"text"}


def test_images_are_the_scenes(files):
    for path, index in ((files.images()[5], 5), (files.images("train")[5], 5)):
        with Image.open(path) as picture:
            difference = np.abs(np.asarray(picture, dtype=float) - render_chat_scene(path.parent.name, index).image)
        assert difference.mean() < 6  # of 255; JPEG


def test_texts_are_in_the_words_of_the_questions(files):
    texts = imagine_conversations(200)
    assert texts == imagine_conversations(200) != imagine_conversations(200, seed=1)
    assert all([message["role"] for message in text] == ["user", "assistant"] * (len(text) // 2) for text in texts)
    seen = [text for text in texts if "\n" in text[0]["content"]]
    assert 120 < len(seen) < 190  # the others are sums
    asked = set()
    for text in texts:
        picture, _, question = text[0]["content"].rpartition("\n")
        assert len(picture.split()) == (16 if text in seen else 0)
        asked |= {re.sub(r"\d", "#", question) for question in [question, *(turn["content"] for turn in text[2::2])]}
    # the language model has met every question that validation asks
    assert {re.sub(r"\d", "#", question.text) for question in files.validation_questions()} <= asked
    assert not any("<image>" in message["content"] for text in texts for message in text)


def test_same_settings_are_kept_and_others_replace(tmp_path):
    root = tmp_path / "chat"
    sizes = {"num_train": 2, "num_val": 1}
    prepare_chat_dataset(root, **sizes)
    before = os.stat(root / "captions.json").st_mtime_ns
    prepare_chat_dataset(root, **sizes)
    assert os.stat(root / "captions.json").st_mtime_ns == before
    files = prepare_chat_dataset(root, **{**sizes, "num_train": 3})
    assert len(read_records(files.captions)) == len(files.images("train")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["chat"]


def test_an_interrupted_build_leaves_the_old_data_set(tmp_path, monkeypatch):
    root = tmp_path / "chat"
    prepare_chat_dataset(root, num_train=2, num_val=1)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "ask_all", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_chat_dataset(root, num_train=3, num_val=1)
    assert [path.name for path in tmp_path.iterdir()] == ["chat"]
    assert len(json.loads((root / "captions.json").read_text())) == 2


def test_foreign_folders_are_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not a digit data set of this kind: move it away"):
        prepare_chat_dataset(tmp_path, num_train=1, num_val=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
