"""Label files that are damaged anywhere are an error that names the file, and never a traceback."""

import copy
import json

import pytest

from llava_piip.eval import BENCHMARKS, Answer, EvalError
from llava_piip.eval.benchmark import read_json, read_json_lines

ASKED = {"image": "a.png", "text": "What?\nAnswer the question using a single word or phrase.", "category": "x"}
LINES = {
    "textvqa": [{"question_id": "im1", **ASKED}],
    "gqa": [{"question_id": "201", **ASKED}],
    "seed": [{"question_id": 1, **ASKED}],
}
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A"}]
LABELS = {
    "textvqa": {"TextVQA_0.5.1_val.json": {"data": [{"image_id": "im1", "question": "What?", "answers": ["a"] * 10}]}},
    "scienceqa": {
        "llava_test_CQM-A.json": [{"id": "4", "image": "4/image.png", "conversations": TURNS}],
        "problems.json": {"4": {"choices": ["x", "y"], "answer": 0}},
        "pid_splits.json": {"test": ["4"]},
    },
    "gqa": {
        "data/testdev_balanced_questions.json": {
            "201": {
                "answer": "yes",
                "isBalanced": True,
                "question": "Is it?",
                "types": {"structural": "verify", "semantic": "rel"},
                "semantic": [{"operation": "select", "argument": "x"}],
                "groups": {"global": "g"},
            }
        }
    },
    "seed": {
        "SEED-Bench.json": {
            "question_type": {"Scene": 1},
            "questions": [{"question_id": "1", "answer": "A", "data_type": "image", "question_type_id": 1}],
        }
    },
}
JUNK = (None, 7, -7, 1.5, "junk", "", [], {}, [[]], {"a": {}}, True)


def damaged(content):
    """The content with each of its values replaced by others, and left out."""
    yield from JUNK
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        for value in damaged(content[key]):
            other = copy.copy(content)
            other[key] = value
            yield other
        other = copy.copy(content)
        del other[key]
        yield other


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in LABELS.items() for file in files])
def test_damaged_labels_are_told(name, file, tmp_path, write_lines):
    benchmark = BENCHMARKS[name]
    if name in LINES:
        write_lines(tmp_path / benchmark.questions, LINES[name])
    for other, content in LABELS[name].items():
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text(json.dumps(content))

    def score():
        questions = benchmark.read(tmp_path / benchmark.questions)
        return benchmark.score(tmp_path / benchmark.questions, [Answer(q.id, q.prompt, "A") for q in questions])

    assert score().value is not None
    told = []
    for content in damaged(LABELS[name][file]):
        (tmp_path / file).write_text(json.dumps(content))
        try:
            score()  # some changes leave a file that makes sense
        except EvalError as error:
            told.append(str(error))
    assert len(told) > 10 and sum(file.rpartition("/")[2] in message for message in told) > len(told) / 2


def test_byte_order_marks_are_read_over(tmp_path):
    """Editors and spreadsheets put them in front."""
    file = tmp_path / "file"
    file.write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8-sig")
    assert list(read_json_lines(file)) == [(f"{file}: line 1", {"a": 1}), (f"{file}: line 2", {"a": 2})]
    file.write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(file) == {"a": 1}
