"""Cases of benchmarks: prompts, decoding settings, answers, scores, and files to send in."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from piip_core.errors import UserError
from piip_core.verification import Check, Comparison, GoldenCase

from ..conversation import IMAGE_TAG
from ..data.images import ImageFolder
from ..eval.answering import Preparation, prompt_of
from ..eval.answers import check_complete, parts_of, read_answers, record
from ..eval.benchmark import Answer, Benchmark, Question, last_answers
from ..eval.gqa import GQA, predictions
from ..eval.gqa import verdicts as gqa_verdicts
from ..eval.mmbench import MMBENCH, MMBENCH_CN, read_mmbench
from ..eval.mmvet import MM_VET
from ..eval.pope import POPE, yes_or_no
from ..eval.scienceqa import SCIENCEQA, verdicts
from ..eval.seed import SEED
from ..eval.textvqa import TEXTVQA, answer_scores, question_of_prompt
from ..eval.vqa_text import normalized
from ..eval.vqav2 import VQAV2

__all__ = [
    "verify_gqa",
    "verify_mmbench",
    "verify_mmvet",
    "verify_pope",
    "verify_questions",
    "verify_scienceqa",
    "verify_seed",
    "verify_textvqa",
    "verify_vqav2",
]


_PROMPTS: Mapping[str, Benchmark] = {
    "POPE": POPE,
    "POPE missing image": POPE,
    "TextVQA": TEXTVQA,
    "GQA": GQA,
    "SEED": SEED,
    "VQAv2": VQAV2,
    "MM-Vet": MM_VET,
    "ScienceQA": SCIENCEQA,
    "ScienceQA gray image": SCIENCEQA,
    "MMBench": MMBENCH,
    "MMBench all rounds": replace(MMBENCH, read=partial(read_mmbench, all_rounds=True)),
    "MMBench CN": MMBENCH_CN,
    "chunks": VQAV2,
}


def verify_questions(case: GoldenCase) -> Check:
    """From question files to prompts, settings and answers files.

    Different on purpose: gray images are no error, and a missing image is one of ours that names it.
    """
    check = Check(case)
    for run in case.info["runs"]:
        name = run["benchmark"]
        benchmark = _PROMPTS[name]
        (content,) = run["files"].values()
        files = {benchmark.questions: content}
        if benchmark is SEED:
            files[SEED.labels[0]] = _labels_of(content)
        with _folder(files) as folder:
            questions = benchmark.read(folder / benchmark.questions)
            preparation = Preparation(benchmark, None, ImageFolder(folder))
            if run.get("exception") == "FileNotFoundError":
                refused = _refused(partial(preparation.image_of, questions[0]))
                _same(check, f"output.{name}.exception", refused, True)
        if name == "chunks":
            questions = parts_of(questions, Path(), math.ceil(len(questions) / 3))[1].questions
        if "exception" in run:
            continue  # the recorded run ended before its first prompt
        for number, (question, call) in enumerate(zip(questions, run["calls"], strict=True)):
            _verify_call(check, f"output.{name}.{number}", preparation, question, call)
        model_id = run["answers_file"][0]["model_id"]
        # Decoding leaves special tokens out
        texts = [call["canned_output"].replace("</s>", "").strip() for call in run["calls"]]
        ours = [record(question, text, model_id) for question, text in zip(questions, texts, strict=True)]
        _same(check, f"output.{name}.answers", *map(_without_random, (ours, run["answers_file"])))
    return check


def _verify_call(
    check: Check, name: str, preparation: Preparation, question: Question, call: Mapping[str, Any]
) -> None:
    prompt = prompt_of(question, chat_template="vicuna_v1")
    _same(check, f"{name}.prompt", prompt, call["prompt"])
    _same(check, f"{name}.has_image", question.image is not None, call["image_shape"] is not None)
    places = prompt.count(IMAGE_TAG) if question.image is not None else 0
    _same(check, f"{name}.n_placeholders", places, call["n_placeholders"])
    settings = call["generate_kwargs"]
    _same(check, f"{name}.max_new_tokens", preparation.benchmark.max_new_tokens, settings["max_new_tokens"])
    if isinstance(question.image, bytes):
        _same(check, f"{name}.image_size", [list(preparation.image_of(question).size)], settings["image_sizes"])


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
    _same(check, "output.words", *_pairs((yes_or_no(e["text"]), e["word"]) for e in case.info["text_to_word"]))
    for number, run in enumerate(case.info["runs"]):
        name = f"output.{number}"
        with _folder(_renamed(run["files"], {"q.jsonl": POPE.questions})) as folder:
            answers, _ = read_answers(folder / "a.jsonl")
            score = POPE.score(folder / POPE.questions, answers)
            in_order = POPE.score(folder / POPE.questions, sorted(answers, key=lambda answer: answer.id))
        recorded = {key: value for key, value in run["metrics"].items() if key != "average_f1_rounded3"}
        for category, metrics in recorded.items():
            ours = score.details["public"][category]
            _same(check, f"{name}.{category}", {key: ours[key] for key in metrics}, metrics)
        if run["exception"] is None:
            _same(check, f"{name}.summary", [f"POPE: {score.public}"], run["summary_line"])
            public = [metrics["F1 score"] for metrics in score.details["public"].values()]
            _same(check, f"{name}.average", round(sum(public) / len(public), 3), run["metrics"]["average_f1_rounded3"])
        _same(check, f"{name}.order", score.value, in_order.value)
    return check


def verify_textvqa(case: GoldenCase) -> Check:
    """Normalised answers, questions found in prompts, worth of answers, and accuracies."""
    check = Check(case)
    _same(check, "output.normalized", *_pairs((normalized(e["raw"]), e["processed"]) for e in case.info["processor"]))
    for number, entry in enumerate(case.info["prompt_to_question"]):
        name = f"output.question.{number}"
        if "exception" in entry:
            _same(check, name, _refused(partial(question_of_prompt, entry["prompt"])), True)
        else:
            _same(check, name, question_of_prompt(entry["prompt"]), entry["question"])
    for number, item in enumerate(case.info["items"]):
        worth = answer_scores(item["answers"])
        recorded = item["unique_answer_scores"]
        _same(check, f"output.item.{number}", _rounded(worth), _rounded(recorded))
        score = worth.get(normalized(item["prediction"]), 0.0)
        _same(check, f"output.item.{number}.score", round(score, 9), round(item["score"], 9))
    for number, run in enumerate(case.info["runs"]):
        with _folder(run["files"]) as folder:
            answers, _ = read_answers(folder / "r.jsonl")
            if run["exception"] is None:
                _same(
                    check,
                    f"output.{number}",
                    TEXTVQA.score(folder / TEXTVQA.questions, answers).lines,
                    run["stdout"][1:],
                )
            else:
                refused = _refused(partial(TEXTVQA.score, folder / TEXTVQA.questions, answers))
                _same(check, f"output.{number}.exception", refused, True)
    return check


def verify_scienceqa(case: GoldenCase) -> Check:
    """Letters, verdicts and accuracies, and the result file; without pictures, their accuracy is undefined in ours."""
    check = Check(case)
    for number, run in enumerate(case.info["runs"]):
        name = f"output.{number}"
        with _folder(run["files"]) as folder:
            answers, _ = read_answers(folder / "a.jsonl")
            found = verdicts(folder / SCIENCEQA.questions, answers)
            score = SCIENCEQA.score(folder / SCIENCEQA.questions, answers)
            result = _exported(SCIENCEQA, folder, answers)
        if run["exception"] is not None:
            _same(check, f"{name}.exception", score.value, None)
            continue
        items = {key: {k: v for k, v in entry.items() if k != "index"} for key, entry in found.items()}
        for key, recorded in run["per_item"].items():
            _same(check, f"{name}.{key}", items[key], recorded)
        _same(check, f"{name}.count", len(items), len(run["per_item"]))
        _same(check, f"{name}.stdout", score.lines[:1], run["stdout"])
        _same(check, f"{name}.file", json.loads(result), run["result_file"])
    return check


def verify_gqa(case: GoldenCase) -> Check:
    """Predictions, verdicts and accuracies, without validity and plausibility, which the public run prints as 0."""
    check = Check(case)
    unknown = {"Validity: 0.00%", "Plausibility: 0.00%"}
    for number, run in enumerate(case.info["runs"]):
        name = f"output.{number}"
        with _folder(_renamed(run["files"], {"testdev_balanced_questions.json": GQA.labels[0]})) as folder:
            answers, _ = read_answers(folder / "answers.jsonl")
            found = gqa_verdicts(folder / GQA.questions, answers)
            score = GQA.score(folder / GQA.questions, answers)
            written = json.loads(_exported(GQA, folder, answers))
        _same(check, f"{name}.converted", written, run["converted"])
        _same(check, f"{name}.predictions", predictions(answers), run["converted"])
        _same(check, f"{name}.per_item", found, run["per_item"])
        if run["exception"] is None:
            titles = [line for line in score.lines if not line.startswith("  ")]
            _same(check, f"{name}.metrics", titles, [line for line in run["stdout_metrics"] if line not in unknown])
            details = [line for line in score.lines if line.startswith("  ")]
            _same(check, f"{name}.details", details, run["stdout_details"])
            _same(check, f"{name}.summary", [f"GQA: {score.value:.1f}"], run["summary_line"])
        else:
            asked = [Question(name, "") for name in found]
            blank = [replace(answer, prompt="") for answer in answers]
            _same(check, f"{name}.exception", _refused(partial(check_complete, asked, blank, "")), True)
    return check


def verify_seed(case: GoldenCase) -> Check:
    """Accuracies and the file for the leaderboard; where the public script stops on the way, ours goes on."""
    check = Check(case)
    for number, run in enumerate(case.info["runs"]):
        with _folder(run["files"]) as folder:
            answers, _ = read_answers(folder / "a.jsonl")
            score = SEED.score(folder / SEED.questions, answers)
            lines = _exported(SEED, folder, answers).splitlines()
        recorded = run["stdout"]
        if run["exception"] is None:
            _same(check, f"output.{number}", score.lines, recorded)
            _same(check, f"output.{number}.upload", [json.loads(line) for line in lines], run["upload"])
        else:
            _same(check, f"output.{number}", score.lines[: len(recorded)], recorded)
            before = run.get("upload") or []
            _same(check, f"output.{number}.upload", [json.loads(line) for line in lines][: len(before)], before)
    return check


def verify_mmbench(case: GoldenCase) -> Check:
    """The table that the server takes, as it is read back from the Excel file."""
    from openpyxl import load_workbook

    check = Check(case)
    for number, run in enumerate(case.info["runs"]):
        with _folder(_renamed(run["files"], {"ann.tsv": MMBENCH.questions})) as folder:
            answers, _ = read_answers(folder / "res" / "exp.jsonl")
            sheet = load_workbook(BytesIO(_exported(MMBENCH, folder, answers))).active
        _same(check, f"output.{number}", [list(row) for row in sheet.iter_rows(values_only=True)], run["table"])
    return check


def verify_mmvet(case: GoldenCase) -> Check:
    """The file for the grader, byte by byte."""
    check = Check(case)
    with _folder(case.info["files"]) as folder:
        answers, _ = read_answers(folder / "a.jsonl")
        written = _exported(MM_VET, folder, answers).decode()
    _same(check, "output.file", written, case.info["output_text"])
    _same(check, "output.content", json.loads(written), case.info["output"])
    return check


def verify_vqav2(case: GoldenCase) -> Check:
    """The file for the server."""
    check = Check(case)
    questions, merged = case.info["files"]
    with _folder(case.info["files"]) as folder:
        answers, broken = read_answers(folder / merged, skip_broken=True)
        written = _exported(VQAV2, (folder / questions).parent, answers)
        total = len(json.loads(written))
    _same(check, "output.file", json.loads(written), case.info["output"])
    counted = f"total results: {len(last_answers(answers))}, total split: {total}, error_line: {broken}"
    _same(check, "output.stdout", [counted], case.info["stdout"])
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


def _renamed(files: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    return {names.get(name, name): content for name, content in files.items()}


def _exported(benchmark: Benchmark, folder: Path, answers: Sequence[Answer]) -> bytes:
    name, export = benchmark.export
    export(folder / benchmark.questions, folder / name, answers)
    return (folder / name).read_bytes()


def _pairs(pairs: Any) -> tuple[list[Any], list[Any]]:
    ours, recorded = zip(*pairs, strict=True)
    return list(ours), list(recorded)


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {key: round(value, 9) for key, value in values.items()}


def _refused(call: Any) -> bool:
    try:
        call()
    except UserError:
        return True
    return False


def _same(check: Check, name: str, ours: Any, recorded: Any) -> None:
    """Compares values of any kind, and says where lists and texts begin to differ."""
    detail = "" if ours == recorded else _difference(ours, recorded)
    check.comparisons.append(Comparison(name, float(bool(detail)), not detail, detail))


def _difference(ours: Any, recorded: Any) -> str:
    if isinstance(ours, list) and isinstance(recorded, list):
        for number, (one, other) in enumerate(zip(ours, recorded, strict=False)):
            if one != other:
                return f"entry {number} is {one!r}, recorded {other!r}"
        return f"{len(ours)} entries, recorded {len(recorded)}"
    return f"is {ours!r}, recorded {recorded!r}"
