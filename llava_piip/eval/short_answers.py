"""Benchmarks with short open answers: TextVQA, VQAv2, MM-Vet, GQA, and POPE."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .benchmark import (
    Answer,
    Benchmark,
    EvalError,
    Question,
    Score,
    checked,
    last_answers,
    percent,
    read_json,
    read_json_lines,
    read_llava_questions,
    write_json,
)

# ---- TextVQA, which compares with ten people's answers, VQAv2, and MM-Vet ----

_MARKS = ';/[]"{}()=+\\_-><@`!'
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the public scripts hand a flag (re.UNICODE) to re.sub where it takes a count
_ARTICLES = ("a", "an", "the")
_DIGITS = "zero one two three four five six seven eight nine ten".split()
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_DIGITS)}

# Contractions that are completed where one apostrophe is missing. In the official table those of I are written with a
# capital, and never match lower-case text.
_NOT = "ai are ca could did does do had has have is might must need ought sha should was were wo would"
_TARGETS = (
    *(f"{word}n't" for word in _NOT.split()),
    *(f"{word}n't've" for word in "could had might should would".split()),
    *(f"{word}'ve" for word in "could might must not should they we what where who would you".split()),
    *(f"{word}'d've" for word in "he it she somebody someone something there they we who y'all you".split()),
    *(f"{word}'d" for word in "he how it someone something there they where who you".split()),
    *(f"{word}'ll" for word in "how it somebody someone something they what who why y'all you".split()),
    *(f"{word}'s" for word in "he how somebody someone that there what when where who why".split()),
    *(f"{word}'re" for word in "there they what why you".split()),
    *("ma'am", "o'clock", "'twas", "y'all", "'ow's'at"),
)
# Spellings with one apostrophe missing, and what they become; the official table has the last one the other way round
_CONTRACTIONS = {
    target[:index] + target[index + 1 :]: target
    for target in _TARGETS
    for index, character in enumerate(target)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def normalized(text: str) -> str:
    """An answer as it is compared: lower case, without punctuation and articles, numbers as digits.

    Follows the official evaluation of VQA as TextVQA uses it, with its peculiarities: a mark is removed where it stands
    next to a space anywhere in the text and becomes a space otherwise, and only the first 32 periods are removed.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ")
    marked = text
    for mark in _MARKS:
        beside_space = f"{mark} " in marked or f" {mark}" in marked
        text = text.replace(mark, "" if beside_space else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


_ANNOTATIONS = "TextVQA_0.5.1_val.json"
_ANNOTATION_FORM = {"data": [{"image_id": str, "question": str, "answers": [str]}]}
_NUM_ANSWERS = 10
_SUFFIX = "Answer the question using a single word or phrase."
_TOKENS = "Reference OCR token: "
_OLD_FORM = re.compile(r"OCR tokens: .*? Question: (?P<question>.*?) Short answer:")


def answer_scores(answers: Sequence[str]) -> dict[str, float]:
    """What each different one of ten answers is worth: the mean over nine of the people of min(1, agreeing / 3)."""
    counts = Counter(map(normalized, answers))
    # Leaving out one who gave the answer leaves count - 1 agreeing, leaving out another one leaves count
    return {
        answer: (count * min(1.0, (count - 1) / 3) + (_NUM_ANSWERS - count) * min(1.0, count / 3)) / _NUM_ANSWERS
        for answer, count in counts.items()
    }


def question_of_prompt(prompt: str) -> str:
    """The question within a prompt, in lower case, by which annotations are found."""
    if match := _OLD_FORM.fullmatch(prompt):
        return match["question"].lower()
    lines = prompt.split("\n")
    inner = [line for line in lines[:-1] if not line.startswith(_TOKENS)]
    if lines[-1] == _SUFFIX and len(lines) <= 3 and len(inner) == 1:
        return inner[0].lower()
    raise EvalError(
        f"prompt {prompt[:120]!r}: expected the question, a line {_TOKENS + '...'!r} before or after it if any, and "
        f"the line {_SUFFIX!r}"
    )


def _score_textvqa(questions_file: Path, answers: Sequence[Answer]) -> Score:
    """Mean worth of the answers; those of questions that were not answered do not count."""
    path = questions_file.parent / _ANNOTATIONS
    entries = read_json(path, _ANNOTATION_FORM)["data"]
    people = {(entry["image_id"], entry["question"].lower()): entry["answers"] for entry in entries}
    total = 0.0
    for answer in answers:
        name, question = str(answer.id), question_of_prompt(answer.prompt)
        given = people.get((name, question), ())
        if len(given) != _NUM_ANSWERS:
            raise EvalError(
                f"{path}: {len(given)} answers to the question {question!r} to image {name!r}, expected {_NUM_ANSWERS}"
            )
        total += answer_scores(given).get(normalized(answer.text), 0.0)
    value = percent(total, len(answers))
    lines = [f"Samples: {len(answers)}", f"Accuracy: {value or 0:.2f}%"]
    return Score(value, lines, {"samples": len(answers), "accuracy": value})


def _without_tokens(questions_file: Path) -> list[Question]:
    """Questions without the line that lists what an OCR program read in the image."""
    questions = read_llava_questions(questions_file)
    lines = (question.text.split("\n") for question in questions)
    texts = ("\n".join(line for line in some if not line.startswith(_TOKENS)) for some in lines)
    return [replace(question, text=text) for question, text in zip(questions, texts, strict=True)]


# The server of VQAv2 wants an entry for every question of the whole test split, of which test-dev is a part
_ALL_QUESTIONS = "llava_vqav2_mscoco_test2015.jsonl"


def _export_vqav2(questions_file: Path, target: Path, answers: Sequence[Answer]) -> None:
    known = last_answers(answers)
    ids = [question.id for question in read_llava_questions(questions_file.parent / _ALL_QUESTIONS)]
    texts = (normalized(known[name].text) if name in known else "" for name in ids)
    write_json(target, [{"question_id": name, "answer": text} for name, text in zip(ids, texts, strict=True)])


def _export_mm_vet(questions_file: Path, target: Path, answers: Sequence[Answer]) -> None:
    write_json(target, {f"v1_{answer.id}": answer.text for answer in answers}, indent=2)


TEXTVQA = Benchmark(
    name="textvqa",
    title="TextVQA",
    folder="textvqa",
    questions="llava_textvqa_val_v051_ocr.jsonl",
    images="train_images",
    labels=(_ANNOTATIONS,),
    published=5000,
    score=_score_textvqa,
)
TEXTVQA_WITHOUT_OCR = replace(
    TEXTVQA, name="textvqa_without_ocr", title="TextVQA without OCR tokens", read=_without_tokens
)
VQAV2 = Benchmark(
    name="vqav2",
    title="VQAv2",
    folder="vqav2",
    questions="llava_vqav2_mscoco_test-dev2015.jsonl",
    images="test2015",
    labels=(_ALL_QUESTIONS,),
    published=107_394,
    export=("vqav2_upload.json", _export_vqav2),
    remote="the VQA challenge's server on EvalAI (test-dev)",
)
MM_VET = Benchmark(
    name="mmvet",
    title="MM-Vet",
    folder="mm-vet",
    questions="llava-mm-vet.jsonl",
    images="images",
    published=218,
    max_new_tokens=1024,
    export=("mmvet_upload.json", _export_mm_vet),
    remote="MM-Vet's grader (GPT-4)",
)

# ---- GQA, test-dev balanced ----

_GQA_LABELS = "data/testdev_balanced_questions.json"
_GQA_LABEL = {
    "answer": str,
    "question": str,
    "types": {"structural": str, "semantic": str},
    "semantic": [{"operation": str, "argument": str}],
    "groups": {"global": (str, type(None))},
}
# Steps of a question's program that end it, and do not count among its steps
_LAST_STEPS = ("exist", "query: name", "choose name")

Label = Mapping[str, Any]  # an official question
Counted = Sequence[tuple[Label, Mapping[str, Any]]]  # with what became of it


def gqa_predictions(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The official script's list of predictions: periods at the end removed, lower case."""
    return [{"questionId": answer.id, "prediction": answer.text.rstrip(".").lower()} for answer in answers]


def read_gqa_labels(questions_file: Path) -> Mapping[str, Label]:
    """The official questions by their ids, which lie beside LLaVA's question file."""
    path = questions_file.parent / _GQA_LABELS
    content = read_json(path, dict)
    if not content:
        raise EvalError(f"{path}: has no questions; load it again")
    for name, label in content.items():
        checked(label, _GQA_LABEL, f"{path}: question {name!r}")
    return content


def gqa_verdicts(labels: Mapping[str, Label], answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """What became of each question: gold, prediction (None without an answer), correct, counted."""
    predicted = {entry["questionId"]: entry["prediction"] for entry in gqa_predictions(answers)}
    return {
        name: {
            "gold": label["answer"],
            "prediction": predicted.get(name),
            "correct": predicted.get(name) == label["answer"],
            "counted": bool(label.get("isBalanced")),
        }
        for name, label in labels.items()
    }


def _score_gqa(questions_file: Path, answers: Sequence[Answer]) -> Score:
    """Accuracy by exact equality, with the official breakdown.

    Validity and plausibility need files that test-dev does not have, and are left out. Questions without an answer,
    at which the official script stops, are not counted.
    """
    labels = read_gqa_labels(questions_file)
    found = gqa_verdicts(labels, answers)
    counted = [(labels[n], v) for n, v in found.items() if v["counted"] and v["prediction"] is not None]
    kinds = _accuracies(counted, lambda label: "Open" if label["types"]["structural"] == "query" else "Binary")
    value = percent(sum(verdict["correct"] for _, verdict in counted), len(counted))
    distribution = _distribution(counted)
    lines = [f"{kind}: {kinds.get(kind, (0.0, 0))[0]:.2f}%" for kind in ("Binary", "Open")]
    lines.append(f"Accuracy: {value or 0:.2f}%")
    if distribution is not None:
        lines.append(f"Distribution: {distribution:.2f} (lower is better)")
    details = {"accuracy": value, "distribution": distribution}
    for title, key in _BREAKDOWN.items():
        groups = _accuracies(counted, key)
        lines.append(f"Accuracy / {title}:")
        lines += [f"  {name}: {groups[name][0]:.2f}% ({groups[name][1]} questions)" for name in sorted(groups)]
        details[title] = {str(name): accuracy for name, (accuracy, _) in groups.items()}
    return Score(value, lines, details)


def _steps(label: Label) -> int:
    """Steps of the program that a question stands for, without those that only read off the result."""
    steps = [f"{step['operation']}: {step['argument']}" for step in label["semantic"]]
    return sum(not any(last in step for last in _LAST_STEPS) for step in steps)


_BREAKDOWN = {
    "structural type": lambda label: label["types"]["structural"],
    "semantic type": lambda label: label["types"]["semantic"],
    "steps number": _steps,
    "words number": lambda label: len(label["question"].split()),
}


def _accuracies(counted: Counted, key: Callable[[Mapping[str, Any]], Any]) -> dict[Any, tuple[float, int]]:
    """Accuracy and number of questions by what the key makes of their labels."""
    groups = defaultdict(list)
    for label, verdict in counted:
        groups[key(label)].append(verdict["correct"])
    return {name: (percent(sum(right), len(right)), len(right)) for name, right in groups.items()}


def _distribution(counted: Counted) -> float | None:
    """Chi-square between right and given answers of questions of one group, averaged by the groups' sizes."""
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for label, verdict in counted:
        group = label["groups"]["global"]
        if group is not None:
            gold[group][verdict["gold"]] += 1
            given[group][verdict["prediction"]] += 1
    size = sum(counts.total() for counts in gold.values())
    total = 0.0
    for group, counts in gold.items():
        chi = sum((given[group][answer] - count) ** 2 / count for answer, count in counts.items())
        total += chi * counts.total()
    return total / size / 100 if size else None


GQA = Benchmark(
    name="gqa",
    title="GQA",
    folder="gqa",
    questions="llava_gqa_testdev_balanced.jsonl",
    images="data/images",
    labels=(_GQA_LABELS,),
    published=12578,
    score=_score_gqa,
    export=(
        "testdev_balanced_predictions.json",
        lambda questions_file, target, answers: write_json(target, gqa_predictions(answers)),
    ),
)

# ---- POPE: is an object in the image? Three ways of choosing the objects that are not ----

_POPE_LABELS = {category: f"coco/coco_pope_{category}.json" for category in ("adversarial", "popular", "random")}
_PRINTED = ("Accuracy", "Precision", "Recall", "F1 score", "Yes ratio")


def yes_or_no(text: str) -> str:
    """What an answer says: "no" if its first sentence has the word No, not or no, otherwise "yes"."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no") for word in words) else "yes"


def _score_pope(questions_file: Path, answers: Sequence[Answer]) -> Score:
    """Compares with the labels, question by question.

    The public script pairs the answers of a category with the labels by their order in the file, takes every label but
    "no" for yes, and its summary drops the last digit of each F1, rounds it, and then takes the mean.
    """
    questions = read_llava_questions(questions_file)
    categories = {question.id: question.category for question in questions}
    known = last_answers(answers)
    details, public = {}, {}
    for category in dict.fromkeys(categories.values()):
        if category not in _POPE_LABELS:
            raise EvalError(f"{questions_file}: category {category!r}; expected {', '.join(_POPE_LABELS)}")
        labels = _read_pope_labels(questions_file.parent / _POPE_LABELS[category])
        asked = [question for question in questions if question.category == category]
        if len(labels) != len(asked):
            raise EvalError(
                f"{questions_file}: {len(asked)} questions of category {category!r}, but {len(labels)} labels in "
                f"{_POPE_LABELS[category]}: they belong to different versions of the benchmark"
            )
        pairs = zip(labels, asked, strict=True)
        details[category] = _pope_metrics((label.lower(), known[q.id].text) for label, q in pairs if q.id in known)
        in_order = [answer.text for answer in answers if categories.get(answer.id) == category]
        public_labels = ("no" if label == "no" else "yes" for label in labels)
        public[category] = _pope_metrics(zip(public_labels, in_order, strict=False))
    value = 100 * sum(found["F1 score"] for found in details.values()) / len(details)
    # The last character of each printed F1 is lost
    printed = [round(float(str(found["F1 score"])[:-1] or 0) * 100, 1) for found in public.values()]
    summary = round(sum(printed) / len(printed), 1)
    lines = []
    for category, found in details.items():
        numbers = ", ".join(f"{name} {found[name]:.3f}" for name in _PRINTED)
        lines.append(f"{category}: {found['n']} answers, {numbers}")
    if f"{summary:.1f}" != f"{value:.1f}":
        lines.append(
            f"the public script gives {summary:.1f}: it pairs answers with labels by their order, and rounds each F1 "
            "after dropping its last digit"
        )
    return Score(value, lines, {**details, "public": public, "public summary": summary})


def _read_pope_labels(path: Path) -> list[str]:
    labels = []
    for where, entry in read_json_lines(path, {"label": str}):
        if entry["label"].lower() not in ("yes", "no"):
            raise EvalError(f"{where}: label {entry['label']!r}, expected yes or no")
        labels.append(entry["label"])
    return labels


def _pope_metrics(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Counts and measures of (label, text of the answer); yes is positive, and what cannot be divided is 0."""
    counts = Counter((label, yes_or_no(text)) for label, text in pairs)
    tp, fp, tn, fn = (counts[pair] for pair in (("yes", "yes"), ("no", "yes"), ("no", "no"), ("yes", "no")))
    n = tp + fp + tn + fn
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    return {
        "n": n,
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "Accuracy": (tp + tn) / max(n, 1),
        "Precision": precision,
        "Recall": recall,
        "F1 score": 2 * precision * recall / (precision + recall) if tp else 0.0,
        "Yes ratio": (tp + fp) / max(n, 1),
    }


POPE = Benchmark(
    name="pope",
    title="POPE",
    folder="pope",
    questions="llava_pope_test.jsonl",
    images="val2014",
    labels=tuple(_POPE_LABELS.values()),
    published=8910,
    score=_score_pope,
)
