"""Scores by the definitions of the benchmarks, where the recorded cases do not reach."""

import base64
import io
import json

import pytest
from openpyxl import load_workbook
from PIL import Image

from llava_piip.eval import BENCHMARKS, Answer, EvalError, find_benchmarks
from llava_piip.eval.multiple_choice import MMBENCH, SCIENCEQA, SEED, chosen_letter, read_mmbench
from llava_piip.eval.short_answers import POPE
from piip_core.zoo import MultimodalScores

OPTIONS = {"A": "a red ball", "B": "cat", "C": "dog", "D": "the cat's tail"}
HEADER = "index question hint A B C D answer category image source l2-category comment split".split()


def picture(colour=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (colour, 0, 0)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def table(path, rows):
    """A table of (index, options, right letter), images as given or drawn."""
    lines = ["\t".join(HEADER)]
    for index, options, answer, *image in rows:
        cells = dict.fromkeys(HEADER, "") | {"index": str(index), "question": "Which?", "split": "dev"}
        cells |= dict(zip("ABCD", options, strict=False)) | {"answer": answer, "image": (image or [picture()])[0]}
        lines.append("\t".join(cells[name] for name in HEADER))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_eight_are_the_published_ones():
    fields = [name.partition("_")[0] for name in MultimodalScores.__dataclass_fields__]  # the table relies on the order
    assert fields == [name if name != "mmvet" else "mm" for name in BENCHMARKS] + ["average"]
    assert {benchmark.name: benchmark.published for benchmark in BENCHMARKS.values()} == {
        "mmbench": 4377,
        "mmvet": 218,
        "textvqa": 5000,
        "scienceqa": 4241,
        "gqa": 12578,
        "vqav2": 107394,
        "seed": 14233,
        "pope": 8910,
    }
    # Those whose public loaders do not convert images before padding
    assert [b.name for b in BENCHMARKS.values() if not b.convert_before_padding] == ["mmbench", "scienceqa"]
    assert [b.name for b in BENCHMARKS.values() if b.max_new_tokens == 1024] == ["mmbench", "mmvet", "scienceqa"]
    assert all(BENCHMARKS[name].name == name for name in BENCHMARKS)
    with pytest.raises(EvalError, match="textvqa"):
        find_benchmarks(["text_vqa"])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("D.", "D"),
        ("B. cat", "B"),
        ("The answer is C", "C"),
        ("b", None),
        ("A", "A"),
        ("A. a red ball", "A"),  # of four words, A may be the article; the text of the option decides
        ("a red ball, I think", "A"),
        ("It is a dog!", "C"),
        ("cat", "B"),
        ("the cat's tail", None),  # two options occur
        ("B or C", None),
        ("", None),
        ("E", None),
    ],
)
def test_letters_of_mmbench(text, letter):
    assert chosen_letter(text, OPTIONS) == letter


def test_circular_and_vanilla_accuracy(tmp_path):
    """A question is right if all of its rotations are; alone it counts for vanilla."""
    rotations = [("cat", "dog", "cow"), ("dog", "cow", "cat"), ("cow", "cat", "dog")]
    rows = [
        (number + turn * 1_000_000, options, "ABC"[options.index("cat")])
        for number in (1, 2, 3)
        for turn, options in enumerate(rotations)
    ]
    path = table(tmp_path / "dev.tsv", rows)
    wrong = {2_000_002, 3}  # a rotated copy of 2, and 3 itself
    other = {"A": "B", "B": "C", "C": "A"}
    answers = [Answer(index, "p", other[right] if index in wrong else right) for index, _, right in rows]
    score = MMBENCH.score(path, answers)
    assert score.value == score.details["circular"] == pytest.approx(100 / 3)
    assert score.details["vanilla"] == pytest.approx(200 / 3)
    assert MMBENCH.score(path, answers[:-1]).details["circular"] == pytest.approx(50)  # 3 has a rotation to come


def test_table_without_right_answers_is_only_exported(tmp_path):
    path = table(tmp_path / "test.tsv", [(1, ("cat", "dog"), "")])
    assert MMBENCH.score(path, [Answer(1, "p", "A")]).value is None
    name, export = MMBENCH.export
    export(path, tmp_path / name, [Answer(1, "p", "=1+1\x0b")])
    cell = load_workbook(tmp_path / name).active.cell(2, 7)
    assert (cell.value, cell.data_type) == ("=1+1", "s")  # a text, no formula


def test_images_of_tables(tmp_path):
    image = picture(200)
    path = table(tmp_path / "t.tsv", [(1, ("x", "y"), "A", image), (1_000_001, ("y", "x"), "B", "1")])
    first, second = read_mmbench(path)
    assert first.image == second.image == base64.b64decode(image)
    with pytest.raises(EvalError, match="index 7: the image is no base64"):
        read_mmbench(table(tmp_path / "t.tsv", [(7, ("x", "y"), "A", "%%%")]))
    path.write_text("index\tquestion\n1\tx\n")
    with pytest.raises(EvalError, match="no column A, B, image"):
        read_mmbench(path)
    path.write_text("\t".join(HEADER) + "\n1\tx\n")
    with pytest.raises(EvalError, match="has not 14 cells"):
        read_mmbench(path)


def test_images_alone_of_seed(tmp_path, write_lines):
    """Questions about videos are not asked, and do not count."""
    labels = [
        {"question_id": "1", "answer": "A", "data_type": "image", "question_type_id": 1},
        {"question_id": "2", "answer": "B", "data_type": "image", "question_type_id": 1},
        {"question_id": "v3", "answer": "C", "data_type": "video", "question_type_id": 2},
    ]
    path = tmp_path / SEED.questions
    (tmp_path / SEED.labels[0]).write_text(json.dumps({"question_type": {"x": 1, "y": 2}, "questions": labels}))
    write_lines(path, [{"question_id": i, "image": "i", "text": "t", "category": "1"} for i in (1, 2, "v3")])
    questions = SEED.read(path)
    assert [question.id for question in questions] == [1, 2]
    score = SEED.score(path, [Answer(1, "t", "A"), Answer(2, "t", "A")])
    assert score.value == 50 and score.lines == ["x: 50.00%", "Total accuracy: 50.00%", "image accuracy: 50.00%"]


def test_labels_of_another_version_are_refused(tmp_path, write_lines):
    write_lines(tmp_path / POPE.questions, [{"question_id": 1, "image": "i", "text": "t", "category": "random"}])
    write_lines(tmp_path / "coco" / "coco_pope_random.json", [{"label": "yes"}, {"label": "no"}])
    with pytest.raises(EvalError, match=r"1 questions .* but 2 labels"):
        POPE.score(tmp_path / POPE.questions, [])
    write_lines(tmp_path / "coco" / "coco_pope_random.json", [{"label": "maybe"}])
    with pytest.raises(EvalError, match="line 1: label 'maybe', expected yes or no"):
        POPE.score(tmp_path / POPE.questions, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "has no questions"),
        ("{}", "expected list"),
        ("{", "no JSON"),
        ('[{"id": 4}]', "'id' is '4', expected str"),
        ('[{"id": "4", "conversations": []}]', "has no turn"),
        ('[{"id": "4", "conversations": [{"from": "human"}]}]', "'value' is missing"),
    ],
)
def test_broken_question_files_say_where(tmp_path, content, message):
    path = tmp_path / SCIENCEQA.questions
    path.write_text(content)
    with pytest.raises(EvalError, match=r"llava_test_CQM-A\.json") as error:
        SCIENCEQA.read(path)
    assert message in str(error.value)


def test_broken_lines_say_where(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": 1, "image": "x", "text": "t"}\n{"question_id": 2, "te\n')
    with pytest.raises(EvalError, match="line 2 is no JSON object"):
        POPE.read(path)
    path.write_text('{"question_id": true, "image": "x", "text": "t"}\n')
    with pytest.raises(EvalError, match="line 1: 'question_id' is 'True'"):
        POPE.read(path)
    path.write_text("")
    with pytest.raises(EvalError, match="no questions"):
        POPE.read(path)
    with pytest.raises(EvalError, match="No such file"):
        POPE.read(tmp_path / "nothing.jsonl")
