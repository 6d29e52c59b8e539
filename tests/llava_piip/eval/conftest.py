"""A small benchmark of POPE's form, and a saved small model to answer it."""

import json

import numpy as np
import pytest
from PIL import Image

CATEGORIES = {"adversarial": 0, "popular": 20_000_000, "random": 10_000_000}
PER_CATEGORY = 7


def write_lines(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.fixture(name="write_lines")
def write_lines_fixture():
    """Writes a file with an object per line."""
    return write_lines


@pytest.fixture
def pope_data(tmp_path):
    """A folder of benchmarks that has a POPE with 21 questions to 3 pictures."""
    root = tmp_path / "eval"
    folder, questions = root / "pope", []
    (folder / "val2014").mkdir(parents=True)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "val2014" / f"{number}.png")
    for category, first in CATEGORIES.items():
        labels = []
        for number in range(PER_CATEGORY):
            text = f"Is there a thing{number} in the image?"
            entry = {"question_id": first + number + 1, "image": f"{number % 3}.png", "category": category}
            questions.append(entry | {"text": f"{text}\nAnswer the question using a single word or phrase."})
            labels.append({"question_id": number + 1, "image": "", "text": text, "label": ("yes", "no")[number % 2]})
        write_lines(folder / "coco" / f"coco_pope_{category}.json", labels)
    write_lines(folder / "llava_pope_test.jsonl", questions)
    return root


@pytest.fixture
def model_folder(tiny_llava, tmp_path):
    """The small model with its processor, as training saves it."""
    model, processor = tiny_llava
    folder = tmp_path / "tiny_model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
