"""The eight benchmarks in one command, on files laid out as published: answers, scores, files to send in, the table."""

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from openpyxl import load_workbook
from PIL import Image

from llava_piip.eval import BENCHMARKS
from llava_piip.eval import __main__ as command
from llava_piip.eval.data_check import check_benchmarks

SHORT = "\nAnswer the question using a single word or phrase."
LETTERS = "\nA. x\nB. y\nAnswer with the option's letter from the given choices directly."


def picture(mode="RGB"):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).convert(mode)


@pytest.fixture
def eval_data(pope_data, write_lines):
    """Folders of all eight, POPE's with 21 questions, the others with two."""
    root = pope_data

    def lines(path, *entries):
        write_lines(
            root / path, [dict(zip(("question_id", "image", "text", "category"), e, strict=True)) for e in entries]
        )

    def as_json(path, content):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(content))

    def image(path, mode="RGB"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        picture(mode).save(root / path)

    lines("mm-vet/llava-mm-vet.jsonl", (0, "0.png", "What is x?", "c"), (1, "0.png", "an <image> inside", "c"))
    image("mm-vet/images/0.png")
    lines("textvqa/llava_textvqa_val_v051_ocr.jsonl",
          *(("ab", "ab.jpg", f"what {i}?\nReference OCR token: A{SHORT}", "default") for i in range(2)))  # fmt: skip
    image("textvqa/train_images/ab.jpg")
    people = {"image_id": "ab", "answers": ["x"] * 10}
    as_json("textvqa/TextVQA_0.5.1_val.json", {"data": [people | {"question": f"What {i}?"} for i in range(2)]})
    turns = [{"from": "human", "value": "<image>\nContext: c\nWhich?\nA. x\nB. y"}, {"from": "gpt", "value": "A"}]
    text = [{"from": "human", "value": "Which?\nA. x\nB. y"}]
    science = [{"id": "4", "image": "4/image.png", "conversations": turns}, {"id": "5", "conversations": text}]
    as_json("scienceqa/llava_test_CQM-A.json", science)
    image("scienceqa/images/test/4/image.png", "P")
    as_json("scienceqa/problems.json", {name: {"choices": ["x", "y"], "answer": 0} for name in "45"})
    as_json("scienceqa/pid_splits.json", {"test": ["4", "5"]})
    lines(
        "gqa/llava_gqa_testdev_balanced.jsonl", *((f"20{i}", "n1.jpg", f"Is it?{SHORT}", "default") for i in range(2))
    )
    image("gqa/data/images/n1.jpg")
    gold = {"answer": "yes", "isBalanced": True, "question": "Is it?", "semantic": [], "groups": {"global": None}}
    gold["types"] = {"structural": "verify", "semantic": "obj"}
    as_json("gqa/data/testdev_balanced_questions.json", {f"20{i}": gold for i in range(2)})
    questions = [(i, "t.jpg", f"Is it?{SHORT}", "default") for i in range(3)]
    lines("vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", *questions[:2])
    lines("vqav2/llava_vqav2_mscoco_test2015.jsonl", *questions)
    image("vqav2/test2015/t.jpg")
    seed = [(i, "SEED-Bench-image/s", f"How?{LETTERS}", "1") for i in (1, 2)]
    lines("seed_bench/llava-seed-bench.jsonl", *seed, ("v3", "SEED-Bench-video-image/v.png", f"How?{LETTERS}", "2"))
    (root / "seed_bench" / "SEED-Bench-image").mkdir()
    picture().save(root / "seed_bench" / "SEED-Bench-image" / "s", "JPEG")
    kinds = {"1": "image", "2": "image", "v3": "video"}
    entries = [{"question_id": i, "answer": "A", "data_type": k, "question_type_id": 1} for i, k in kinds.items()]
    as_json("seed_bench/SEED-Bench.json", {"question_type": {"kind": 1}, "questions": entries})
    file = io.BytesIO()
    picture().save(file, "JPEG")
    cell = base64.b64encode(file.getvalue()).decode()
    rows = ["index question hint A B C D answer category image".split()]
    rows += [[str(i), "Which?", "", "x", "y", "", "", "A", "c", cell] for i in (1, 1_000_001)]
    (root / "mmbench").mkdir()
    (root / "mmbench" / "mmbench_dev_20230712.tsv").write_text("\n".join("\t".join(row) for row in rows) + "\n")
    return root


@pytest.fixture
def short_answers(monkeypatch):
    for benchmark in list(BENCHMARKS.values()):
        monkeypatch.setitem(BENCHMARKS, benchmark.name, replace(benchmark, max_new_tokens=3))


@pytest.mark.usefixtures("short_answers")
def test_the_eight_in_one_command(eval_data, model_folder, tmp_path, capsys):
    output = tmp_path / "my_run"
    arguments = ["all", "--model", model_folder, "--data", eval_data, "--output", output, "--workers", 0, "--cpu"]
    assert command.main(list(map(str, [*arguments, "--batch-size", 8]))) == 0
    counts = {b.name: len((output / b.name / "answers.jsonl").read_text().splitlines()) for b in BENCHMARKS.values()}
    assert counts == dict.fromkeys((b.name for b in BENCHMARKS.values()), 2) | {"pope": 21}
    scored = {path.parent.name for path in output.glob("*/scores.json")}
    assert scored == {"mmbench", "textvqa", "scienceqa", "gqa", "seed", "pope"}
    printed = capsys.readouterr().out
    assert all(benchmark.title in printed for benchmark in BENCHMARKS.values()) and "**my_run**" in printed

    vqav2 = json.loads((output / "vqav2" / "vqav2_upload.json").read_text())
    assert [entry["question_id"] for entry in vqav2] == [0, 1, 2] and vqav2[2]["answer"] == ""
    assert list(json.loads((output / "mmvet" / "mmvet_upload.json").read_text())) == ["v1_0", "v1_1"]
    sheet = load_workbook(output / "mmbench" / "mmbench_dev_upload.xlsx").active
    assert [cell.value for cell in sheet[1]] == ["index", "question", "A", "B", "C", "D", "prediction", "answer"]
    assert len((output / "seed" / "seed_bench_upload.jsonl").read_text().splitlines()) == 2
    gqa = json.loads((output / "gqa" / "testdev_balanced_predictions.json").read_text())
    assert [entry["questionId"] for entry in gqa] == ["200", "201"]
    science = [json.loads(line)["prompt"] for line in (output / "scienceqa" / "answers.jsonl").read_text().splitlines()]
    assert [prompt.startswith("<image>\n") for prompt in science] == [True, False]


@pytest.mark.usefixtures("short_answers")
def test_textvqa_without_ocr_tokens(eval_data, model_folder, tmp_path):
    """The same questions without the line of tokens; beside the eight, and scored by the same labels."""
    questions = eval_data / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl"
    given = [json.loads(line) for line in questions.read_text().splitlines()]
    assert any("Reference OCR token" in entry["text"] for entry in given)
    arguments = ["textvqa_without_ocr", "--model", model_folder, "--data", eval_data, "--output", tmp_path, "--cpu"]
    assert command.main(list(map(str, [*arguments, "--workers", 0]))) == 0
    folder = tmp_path / "textvqa_without_ocr"
    asked = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [entry["question_id"] for entry in asked] == [entry["question_id"] for entry in given]
    for entry, whole in zip(asked, given, strict=True):
        left = [line for line in whole["text"].splitlines() if "OCR" not in line]
        assert entry["prompt"].splitlines() == left and len(left) == 2
    assert json.loads((folder / "scores.json").read_text())["complete"]


def test_the_eight_are_in_order(eval_data):
    """But for the numbers of questions."""
    report = check_benchmarks(BENCHMARKS.values(), eval_data, decode="full", workers=1)
    problems = [problem for part in report.sets for problem in part.problems]
    assert {problem.kind for problem in problems} == {"number of questions"}, problems
    assert [part.found for part in report.sets if part.expected] == [2, 2, 2, 2, 2, 2, 2, 21]


def test_missing_package_is_said_first(eval_data, model_folder, monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    arguments = ["mmbench", "--model", model_folder, "--data", eval_data, "--cpu"]
    assert command.main(list(map(str, arguments))) == 2
    assert "pip install openpyxl" in capsys.readouterr().err
