"""Cases of benchmarks: prompts, decoding settings, answers, scores, and files to send in."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from checkers import Check, GoldenCase
from llava_piip.conversation import IMAGE_TAG
from llava_piip.data.images import ImageFolder
from llava_piip.eval.benchmark import Answer, Benchmark, Question, last_answers
from llava_piip.eval.multiple_choice import MMBENCH, SCIENCEQA, SEED, read_mmbench, scienceqa_verdicts
from llava_piip.eval.running import check_complete, image_of, prompt_of, read_answers, record
from llava_piip.eval.short_answers import (
    GQA,
    MM_VET,
    POPE,
    TEXTVQA,
    VQAV2,
    answer_scores,
    gqa_predictions,
    gqa_verdicts,
    normalized,
    question_of_prompt,
    read_gqa_labels,
    yes_or_no,
)

# Benchmarks by what recorded runs call them, which may be followed by what is special about the run
_NAMES = {
    "POPE": POPE,
    "TextVQA": TEXTVQA,
    "GQA": GQA,
    "SEED": SEED,
    "VQAv2": VQAV2,
    "MM-Vet": MM_VET,
    "ScienceQA": SCIENCEQA,
    "MMBench": MMBENCH,
}
# What the public programs are for, to name a benchmark by
_PROGRAMS = {
    "model_vqa_loader": VQAV2,
    "model_vqa": MM_VET,
    "model_vqa_science": SCIENCEQA,
    "model_vqa_mmbench": MMBENCH,
}
_CHINESE = "\n请直接回答选项字母。"  # which MMBench-CN ends its questions with
_SPECIAL_TOKENS = re.compile(r"</?s>|<unk>")


def _benchmark_of(run: Mapping[str, Any]) -> Benchmark:
    named = [benchmark for name, benchmark in _NAMES.items() if run["benchmark"].startswith(name)]
    benchmark = named[0] if named else _PROGRAMS[run["program"]]
    options = {"instruction": _CHINESE} if _option(run, "--lang") == "cn" else {}
    if _option(run, "--all-rounds"):
        options["all_rounds"] = True
    return replace(benchmark, read=partial(read_mmbench, **options)) if options else benchmark


def _option(run: Mapping[str, Any], name: str) -> str | None:
    """What follows an option on the command line of a recorded run; None if it is not there."""
    words = run["extra_options"]
    return [*words, "set"][words.index(name) + 1] if name in words else None


def verify_questions(case: GoldenCase) -> Check:
    """From question files to prompts, settings and answers files.

    Different on purpose: gray images are no error, and a missing image is one of ours that names it.
    """
    check = Check(case)
    for run in case.info["runs"]:
        name, benchmark = run["benchmark"], _benchmark_of(run)
        (content,) = run["files"].values()
        files = {benchmark.questions: content}
        if benchmark is SEED:
            files[SEED.labels[0]] = _labels_of(content)
        with _folder(files) as folder:
            questions = benchmark.read(folder / benchmark.questions)
            if _option(run, "--num-chunks"):
                size = math.ceil(len(questions) / int(_option(run, "--num-chunks")))
                questions = questions[int(_option(run, "--chunk-idx")) * size :][:size]
            if run.get("exception") == "FileNotFoundError":
                missing = partial(image_of, questions[len(run["calls"])], benchmark, ImageFolder(folder))
                check.refuses(f"output.{name}.exception", missing)
        if "exception" not in run:
            check.same(f"output.{name}.calls", len(questions), len(run["calls"]))
        for number, (question, call) in enumerate(zip(questions, run["calls"], strict=False)):
            _verify_call(check, f"output.{name}.{number}", benchmark, question, call)
        # Decoding leaves special tokens out
        texts = [_SPECIAL_TOKENS.sub("", call["canned_output"]).strip() for call in run["calls"]]
        asked = zip(questions, texts, run["answers_file"], strict=False)
        ours = [record(question, text, recorded["model_id"]) for question, text, recorded in asked]
        check.same(f"output.{name}.answers", *map(_without_random, (ours, run["answers_file"])))
    return check


def _verify_call(check: Check, name: str, benchmark: Benchmark, question: Question, call: Mapping[str, Any]) -> None:
    prompt = prompt_of(question, chat_template="vicuna_v1")  # of the public evaluation script
    check.same(f"{name}.prompt", prompt, call["prompt"])
    check.same(f"{name}.has_image", question.image is not None, call["image_shape"] is not None)
    placeholders = prompt.count(IMAGE_TAG) if question.image is not None else 0
    check.same(f"{name}.n_placeholders", placeholders, call["n_placeholders"])
    settings = call["generate_kwargs"]
    check.same(f"{name}.max_new_tokens", benchmark.max_new_tokens, settings["max_new_tokens"])
    if isinstance(question.image, bytes):
        check.same(f"{name}.image_size", [list(image_of(question, benchmark, None).size)], settings["image_sizes"])


def _labels_of(questions: str) -> str:
    """A label file for the questions, all of which are about images."""
    entries = [json.loads(line) for line in questions.splitlines()]
    labels = [{"question_id": str(e["question_id"]), "answer": "A", "data_type": "image"} for e in entries]
    return json.dumps({"question_type": {}, "questions": labels})


def _without_random(records: Sequence[Mapping[str, Any]]) -> list[list[tuple[str, Any]]]:
    """Records with their fields in order, but for the random id."""
    return [[(k, v) for k, v in entry.items() if k != "answer_id"] for entry in records]


def verify_pope(case: GoldenCase) -> Check:
    """Words, counts and measures per category, and the number of the summary.

    Ours pairs answers with labels by question, takes labels for what they say whatever their case, keeps all digits and
    knows what to do where nothing is positive; what the public script does instead is compared as the public number.
    """
    check = Check(case)
    check.same("output.words", *_pairs((yes_or_no(e["text"]), e["word"]) for e in case.info["text_to_word"]))
    for number, run in enumerate(case.info["runs"]):
        name = f"output.{number}"
        with _recorded(run["files"], POPE.labels, POPE.questions) as (folder, file):
            answers, _ = read_answers(file)
            score = POPE.score(folder / POPE.questions, answers)
            in_order = POPE.score(folder / POPE.questions, sorted(answers, key=lambda answer: answer.id))
        recorded = {key: value for key, value in run["metrics"].items() if key != "average_f1_rounded3"}
        for category, metrics in recorded.items():
            ours = score.details["public"][category]
            check.same(f"{name}.{category}", {key: ours[key] for key in metrics}, metrics)
        if run["exception"] is None:
            check.same(f"{name}.summary", [f"POPE: {score.details['public summary']}"], run["summary_line"])
            public = [metrics["F1 score"] for metrics in score.details["public"].values()]
            check.same(f"{name}.average", round(sum(public) / len(public), 3), run["metrics"]["average_f1_rounded3"])
        check.same(f"{name}.order", score.value, in_order.value)
    return check


def verify_textvqa(case: GoldenCase) -> Check:
    """Normalised answers, questions found in prompts, worth of answers, and accuracies."""
    check = Check(case)
    check.same("output.normalized", *_pairs((normalized(e["raw"]), e["processed"]) for e in case.info["processor"]))
    for number, entry in enumerate(case.info["prompt_to_question"]):
        name = f"output.question.{number}"
        if "exception" in entry:
            check.refuses(name, partial(question_of_prompt, entry["prompt"]))
        else:
            check.same(name, question_of_prompt(entry["prompt"]), entry["question"])
    for number, item in enumerate(case.info["items"]):
        worth = answer_scores(item["answers"])
        recorded = item["unique_answer_scores"]
        check.same(f"output.item.{number}", _rounded(worth), _rounded(recorded))
        score = worth.get(normalized(item["prediction"]), 0.0)
        check.same(f"output.item.{number}.score", round(score, 9), round(item["score"], 9))
    for number, run in enumerate(case.info["runs"]):
        with _recorded(run["files"], TEXTVQA.labels) as (folder, file):
            answers, _ = read_answers(file)
            score = partial(TEXTVQA.score, folder / TEXTVQA.questions, answers)
            if run["exception"] is None:
                check.same(f"output.{number}", score().lines, run["stdout"][1:])
            else:
                check.refuses(f"output.{number}.exception", score)
    return check


def verify_scienceqa(case: GoldenCase) -> Check:
    """Letters, verdicts and accuracies, and the result file; without pictures, their accuracy is undefined in ours."""
    check = Check(case)
    for number, run in enumerate(case.info["runs"]):
        name = f"output.{number}"
        with _recorded(run["files"]) as (folder, file):
            answers, _ = read_answers(file)
            found = scienceqa_verdicts(folder / SCIENCEQA.questions, answers)
            score = SCIENCEQA.score(folder / SCIENCEQA.questions, answers)
            result = _exported(SCIENCEQA, folder, answers)
        if run["exception"] is not None:
            check.same(f"{name}.exception", score.value, None)
            continue
        items = {key: {k: v for k, v in entry.items() if k != "index"} for key, entry in found.items()}
        for key, recorded in run["per_item"].items():
            check.same(f"{name}.{key}", items[key], recorded)
        check.same(f"{name}.count", len(items), len(run["per_item"]))
        check.same(f"{name}.stdout", score.lines[:1], run["stdout"])
        check.same(f"{name}.file", json.loads(result), run["result_file"])
    return check


def verify_gqa(case: GoldenCase) -> Check:
    """Predictions, verdicts and accuracies, without validity and plausibility, which the public run prints as 0."""
    check = Check(case)
    unknown = {"Validity: 0.00%", "Plausibility: 0.00%"}
    for number, run in enumerate(case.info["runs"]):
        name = f"output.{number}"
        with _recorded(run["files"], GQA.labels, GQA.labels[0]) as (folder, file):
            answers, _ = read_answers(file)
            found = gqa_verdicts(read_gqa_labels(folder / GQA.questions), answers)
            score = GQA.score(folder / GQA.questions, answers)
            written = json.loads(_exported(GQA, folder, answers))
        check.same(f"{name}.converted", written, run["converted"])
        check.same(f"{name}.predictions", gqa_predictions(answers), run["converted"])
        check.same(f"{name}.per_item", found, run["per_item"])
        if run["exception"] is None:
            titles = [line for line in score.lines if not line.startswith("  ")]
            check.same(f"{name}.metrics", titles, [line for line in run["stdout_metrics"] if line not in unknown])
            details = [line for line in score.lines if line.startswith("  ")]
            check.same(f"{name}.details", details, run["stdout_details"])
            check.same(f"{name}.summary", [f"GQA: {score.value:.1f}"], run["summary_line"])
        else:
            asked = [Question(name, "") for name in found]
            blank = [replace(answer, prompt="") for answer in answers]
            check.refuses(f"{name}.exception", partial(check_complete, asked, blank, ""))
    return check


def verify_seed(case: GoldenCase) -> Check:
    """Accuracies and the file for the leaderboard; where the public script stops on the way, ours goes on."""
    check = Check(case)
    for number, run in enumerate(case.info["runs"]):
        with _recorded(run["files"], SEED.labels, SEED.labels[0]) as (folder, file):
            answers, _ = read_answers(file)
            score = SEED.score(folder / SEED.questions, answers)
            lines = _exported(SEED, folder, answers).splitlines()
        recorded = run["stdout"]
        if run["exception"] is None:
            check.same(f"output.{number}", score.lines, recorded)
            check.same(f"output.{number}.upload", [json.loads(line) for line in lines], run["upload"])
        else:
            check.same(f"output.{number}", score.lines[: len(recorded)], recorded)
            before = run.get("upload") or []
            check.same(f"output.{number}.upload", [json.loads(line) for line in lines][: len(before)], before)
    return check


def verify_mmbench(case: GoldenCase) -> Check:
    """The table that the server takes, as it is read back from the Excel file."""
    from openpyxl import load_workbook

    check = Check(case)
    for number, run in enumerate(case.info["runs"]):
        with _recorded(run["files"], (), MMBENCH.questions) as (folder, file):
            answers, _ = read_answers(file)
            sheet = load_workbook(BytesIO(_exported(MMBENCH, folder, answers))).active
        check.same(f"output.{number}", [list(row) for row in sheet.iter_rows(values_only=True)], run["table"])
    return check


def verify_mmvet(case: GoldenCase) -> Check:
    """The file for the grader, byte by byte."""
    check = Check(case)
    with _recorded(case.info["files"]) as (folder, file):
        answers, _ = read_answers(file)
        written = _exported(MM_VET, folder, answers).decode()
    check.same("output.file", written, case.info["output_text"])
    check.same("output.content", json.loads(written), case.info["output"])
    return check


def verify_vqav2(case: GoldenCase) -> Check:
    """The file for the server."""
    check = Check(case)
    with _recorded(case.info["files"], (), VQAV2.labels[0]) as (folder, file):
        answers, broken = read_answers(file, skip_broken=True)
        written = _exported(VQAV2, folder, answers)
        total = len(json.loads(written))
    check.same("output.file", json.loads(written), case.info["output"])
    counted = f"total results: {len(last_answers(answers))}, total split: {total}, error_line: {broken}"
    check.same("output.stdout", [counted], case.info["stdout"])
    return check


@contextmanager
def _folder(files: Mapping[str, str]) -> Iterator[Path]:
    """A temporary folder with files of given contents."""
    with tempfile.TemporaryDirectory() as name:
        for path, content in files.items():
            target = Path(name, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content, encoding="utf-8", newline="")
        yield Path(name)


@contextmanager
def _recorded(files: Mapping[str, str], known: Sequence[str] = (), other: str = "") -> Iterator[tuple[Path, Path]]:
    """A temporary folder with the files of a run, and the file of answers among them, which may have none.

    Args:
        files: Contents by name.
        known: Names that stay.
        other: Our name for a file that is neither known nor has answers; empty if all such names stay.
    """
    file = next(
        name
        for name, content in files.items()
        if name.endswith(".jsonl") and ("answer_id" in content or not content.strip())
    )
    names = {name: other for name in files if other and name not in (file, *known)}
    with _folder({names.get(name, name): content for name, content in files.items()}) as folder:
        yield folder, folder / file


def _exported(benchmark: Benchmark, folder: Path, answers: Sequence[Answer]) -> bytes:
    name, export = benchmark.export
    export(folder / benchmark.questions, folder / name, answers)
    return (folder / name).read_bytes()


def _pairs(pairs: Any) -> tuple[list[Any], list[Any]]:
    ours, recorded = zip(*pairs, strict=True)
    return list(ours), list(recorded)


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {key: round(value, 9) for key, value in values.items()}
