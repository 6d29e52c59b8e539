"""A benchmark from the command line to the score: batches, processes, kills, other models, missing files."""

import json
import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState

from llava_piip.eval import BENCHMARKS, running
from llava_piip.eval import __main__ as command
from llava_piip.eval.short_answers import POPE
from llava_piip.inference import ChatModel
from piip_core.files import lock_folder


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "pope", replace(POPE, max_new_tokens=6))


@pytest.fixture
def run(model_folder, pope_data, tmp_path):
    def run(*options, output="out"):
        common = ["--model", model_folder, "--data", pope_data, "--output", tmp_path / output]
        return command.main(["pope", *map(str, [*common, "--cpu", "--workers", 0, *options])])

    return run


def answers_of(folder):
    lines = (folder / "pope" / "answers.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "answer_id"} for line in lines]


def in_processes(target, *numbers):
    """The exit codes of forked processes, one for each number, which is what it is told."""

    def forked(number):
        os.environ["OMP_NUM_THREADS"] = "1"  # OpenMP's threads do not live on in a fork, which would wait for them;
        torch.set_num_threads(1)  # accelerate reads the variable
        target(number)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=forked, args=(number,)) for number in numbers]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def test_answers_score_and_files(run, tmp_path, pope_data, model_folder, capsys):
    assert run("--batch-size", 4) == 0
    found = answers_of(tmp_path / "out")
    questions = [json.loads(line) for line in (pope_data / "pope" / POPE.questions).read_text().splitlines()]
    assert [(a["question_id"], a["prompt"]) for a in found] == [(q["question_id"], q["text"]) for q in questions]
    assert list(found[0]) == ["question_id", "prompt", "text", "model_id", "metadata"]
    score = json.loads((tmp_path / "out" / "pope" / "scores.json").read_text())
    assert score["complete"] and f"POPE: {score['value']:.1f}" in capsys.readouterr().out

    # One at a time, as published, the same model says the same
    model, question = ChatModel.load(model_folder), questions[8]
    messages = [{"role": "user", "content": f"<image>\n{question['text']}"}]
    image = str(pope_data / "pope" / "val2014" / question["image"])
    assert "".join(model.stream(messages, [image], max_new_tokens=6)).strip() == found[8]["text"]
    settings = model.generation_config(max_new_tokens=6)
    assert not settings.do_sample and settings.num_beams in (None, 1)


def test_killed_run_goes_on(run, tmp_path, monkeypatch):
    """A process that dies in the middle of a line; the answers are those of a run that was left alone."""
    assert run("--batch-size", 4, output="whole") == 0
    whole = answers_of(tmp_path / "whole")

    def die_in_third_batch(_):
        written, write = [], running._add

        def dying(records, file):
            written.append(1)
            if len(written) == 3:
                file.write('{"question_id": 5, "pro')
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            write(records, file)

        running._add = dying
        run("--batch-size", 4)

    assert in_processes(die_in_third_batch, 0) == [-signal.SIGKILL]
    (part,) = (tmp_path / "out" / "pope" / "parts").iterdir()
    assert part.read_text().count("\n") == 8 and not part.read_text().endswith("\n")
    assert not (tmp_path / "out" / "pope" / "answers.jsonl").exists()
    kept = part.read_text().splitlines()[:8]
    assert run("--batch-size", 3) == 0
    assert answers_of(tmp_path / "out") == whole
    assert (tmp_path / "out" / "pope" / "answers.jsonl").read_text().splitlines()[:8] == kept  # not asked again


def test_two_processes_share_the_questions(run, tmp_path, free_port):
    """Each answers some, and nothing is counted twice; a run by one process goes on with what two have answered."""
    port = free_port()

    def process(rank):
        PartialState._reset_state()  # what the parent process knew
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os._exit(run("--batch-size", 4))

    assert in_processes(process, 0, 1) == [0, 0]
    parts = sorted((tmp_path / "out" / "pope" / "parts").iterdir())
    assert [part.read_text().count("\n") for part in parts] == [11, 10]
    together = answers_of(tmp_path / "out")
    assert run("--batch-size", 4, output="alone") == 0
    assert together == answers_of(tmp_path / "alone")
    kept = [part.read_text().splitlines(keepends=True)[:4] for part in parts]
    for part, lines in zip(parts, kept, strict=True):
        part.write_text("".join(lines) + '{"question')
    assert run("--batch-size", 4) == 0 and answers_of(tmp_path / "out") == together
    assert set(kept[1]) <= set((tmp_path / "out" / "pope" / "answers.jsonl").read_text().splitlines(keepends=True))


def test_other_run_in_the_same_folder_is_refused(run, pope_data, capsys):
    assert run("--limit", 2) == 0
    assert run("--limit", 3) == 2
    assert "questions was 2, is 3" in capsys.readouterr().err
    assert run("--limit", 3, "--restart") == 0
    questions = pope_data / "pope" / POPE.questions
    questions.write_text(questions.read_text().replace("thing0", "thing9"))
    assert run("--limit", 3) == 2
    assert "question file" in capsys.readouterr().err


def test_a_folder_of_other_things_is_no_run_and_stays(run, tmp_path, capsys):
    mine = tmp_path / "out" / "pope" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for options in ((), ("--restart",)):
        assert run("--limit", 2, *options) == 2 and mine.read_text() == "mine"
        assert "holds other files" in capsys.readouterr().err


def test_second_run_at_the_same_time_is_refused(run, tmp_path):
    assert run("--limit", 2) == 0
    part = tmp_path / "out" / "pope" / "parts" / "part-00000.jsonl"
    part.write_text(part.read_text().splitlines(keepends=True)[0])
    with lock_folder(tmp_path / "out" / "pope", ""):
        assert in_processes(lambda _: os._exit(run("--limit", 2)), 0) == [2]
    assert part.read_text().count("\n") == 1
    assert run("--limit", 2) == 0


def test_missing_files_and_images_are_named(run, pope_data, tmp_path, capsys):
    (pope_data / "pope" / "val2014" / "2.png").unlink()
    assert run("--workers", 1) == 2
    printed = capsys.readouterr().err
    assert "error: image '2.png' is missing" in printed and "Traceback" not in printed
    assert answers_of_part(tmp_path) == 2  # what was answered before stays
    (pope_data / "pope" / "coco" / "coco_pope_random.json").unlink()
    assert run(output="other") == 2
    assert "coco_pope_random.json" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def answers_of_part(folder):
    return (folder / "out" / "pope" / "parts" / "part-00000.jsonl").read_text().count("\n")


def test_given_answers_are_scored(pope_data, tmp_path, capsys):
    questions = POPE.read(POPE.question_file(pope_data))
    wrong_order = list(reversed(questions))
    file = tmp_path / "given.jsonl"
    lines = [
        json.dumps({"question_id": q.id, "prompt": q.prompt, "text": "Yes" if (q.id % 1000) % 2 else "No"})
        for q in wrong_order
    ]
    file.write_text("\n".join(lines) + "\n")
    arguments = ["pope", "--data", str(pope_data), "--output", str(tmp_path / "scored"), "--answers", str(file)]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "POPE: 100.0" in printed and "the public script gives" not in printed
    file.write_text("\n".join(lines[1:]) + "\n")
    assert command.main(arguments) == 2
    assert "1 questions have no answer" in capsys.readouterr().err
    assert command.main([*arguments, "--partial"]) == 0
    assert "no result to compare" in capsys.readouterr().err
    file.write_text("\n".join([*lines, lines[0]]) + "\n")
    assert command.main(arguments) == 2
    assert "answered already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pop", "--data", "x", "--model", "."], "invalid choice: 'pop'"),
        (["pope", "--data", "x"], "expected --model"),
        (["pope", "gqa", "--data", "x", "--answers", "y"], "single benchmark"),
        (["pope", "--data", "x", "--model", "."] + ["--batch-size", "0"], "expected at least 1"),
        (["pope", "--data", "x", "--model", "nowhere"], "is no folder"),
        (["table", "--set", "pope=1"], "expected one run"),
        (["table", "x", "--set", "pope"], "NAME=SCORE"),
    ],
)
def test_wrong_command_lines(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())
