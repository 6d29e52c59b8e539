"""What is wrong with the files of a benchmark is found before anything is answered."""

import json
from dataclasses import replace

import pytest

from llava_piip.eval.data_check import check_benchmarks
from llava_piip.eval.multiple_choice import MMBENCH
from llava_piip.eval.short_answers import POPE

SMALL = replace(POPE, published=21)


def kinds(report):
    return [problem.kind for problem in problems(report)]


def problems(report):
    return [problem for part in report.sets for problem in part.problems]


def test_good_data(pope_data):
    report = check_benchmarks([SMALL], pope_data, decode="full", workers=1)
    assert report.ok and [part.found for part in report.sets] == [21, 3]


def test_everything_wrong_is_found(pope_data):
    folder = pope_data / "pope"
    (folder / "val2014" / "1.png").unlink()
    broken = folder / "val2014" / "2.png"
    broken.write_bytes(broken.read_bytes()[:200])
    questions = folder / POPE.questions
    lines = questions.read_text().splitlines()
    questions.write_text("\n".join([*lines, lines[0]]) + "\n")
    report = check_benchmarks([SMALL], pope_data, decode="full", workers=1)
    found = set(kinds(report))
    assert found == {"entry malformed", "image missing", "image broken", "file unusable", "number of questions"}
    assert not report.ok
    (labels,) = (problem for problem in problems(report) if problem.kind == "file unusable")
    assert "8 questions of category 'adversarial', but 7 labels" in labels.message
    (twice,) = (problem for problem in problems(report) if problem.kind == "entry malformed")
    assert twice.entry == 21 and "is question 0 again" in twice.message
    (number,) = (problem for problem in problems(report) if problem.kind == "number of questions")
    assert number.message == f"{questions}: 22 questions: expected 21"


def test_missing_files_are_listed(pope_data):
    (pope_data / "pope" / "coco" / "coco_pope_popular.json").unlink()
    report = check_benchmarks([SMALL, MMBENCH], pope_data, workers=1)
    assert kinds(report) == ["file unusable"] * 2
    assert "coco_pope_popular.json: missing" in problems(report)[0].message
    assert MMBENCH.questions in problems(report)[1].message


def test_command_line(pope_data, tmp_path, capsys, load_script):
    main = load_script("verify").main
    assert main(["llava-eval", "pope", str(pope_data), "--workers", "1", "--report", str(tmp_path / "r.json")]) == 1
    assert "21 questions: expected 8910" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())
    with pytest.raises(SystemExit, match="no benchmark is named 'popes'"):
        main(["llava-eval", "popes", str(pope_data)])
