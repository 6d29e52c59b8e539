"""What the trained model answers: accuracy beside that of not looking, and a drawing of dialogues."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from piip_core.files import atomic_path

from ..conversation import IMAGE_TAG
from ..data.images import read_image
from ..inference import ChatModel
from ..integrations.answering import Conversation, answer_batch
from .questions import QUESTION_TYPES, Question

MOST_TOKENS = 48
RIGHT, WRONG, _ASKED = "#1a7f37", "#cf222e", "#57606a"


class TypeScore(NamedTuple):
    """How many questions of a type were asked, and the parts that model and baseline answered exactly right."""

    type: str
    count: int
    accuracy: float
    baseline: float


def answer_all(chat: ChatModel, questions: Sequence[Question], image_root: Path, *, batch_size: int = 64) -> list[str]:
    """Answers questions, each in a conversation of its own, in batches and without sampling."""
    answers: list[str] = []
    for first in tqdm(range(0, len(questions), batch_size), desc="Answers", unit="batch"):
        batch = [_conversation(question, image_root) for question in questions[first : first + batch_size]]
        answers += answer_batch(chat, batch, max_new_tokens=MOST_TOKENS)
    return answers


def _conversation(question: Question, image_root: Path) -> Conversation:
    if question.image is None:
        return Conversation([{"role": "user", "content": question.text}], [])
    image = read_image(image_root / question.image, question.image, as_viewed=True)
    return Conversation([{"role": "user", "content": f"{IMAGE_TAG}\n{question.text}"}], [image])


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer is exactly the right one; only white space around it does not count."""
    return answer.strip() == question.answer


def score(questions: Sequence[Question], answers: Sequence[str], training: Iterable[Question]) -> list[TypeScore]:
    """Compares answers with the right ones, for each type that was asked.

    The baseline always gives the most frequent answer of training: to the same words, where training asked them, or to
    all questions of the type. Whichever of the two comes out better counts.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in training:
        counts[question.type][question.answer] += 1
        counts[question.text][question.answer] += 1
    # Of equally frequent answers, the first in the alphabet
    common = {key: min(counter, key=lambda a, c=counter: (-c[a], a)) for key, counter in counts.items()}
    scores = []
    for kind in QUESTION_TYPES:
        asked = [pair for pair in zip(questions, answers, strict=True) if pair[0].type == kind]
        constant = common.get(kind, "")
        by_type = [(question, constant) for question, _ in asked]
        by_words = [(question, common.get(question.text, constant)) for question, _ in asked]
        if asked:
            scores.append(TypeScore(kind, len(asked), _accuracy(asked), max(_accuracy(by_type), _accuracy(by_words))))
    return scores


def format_scores(scores: Sequence[TypeScore]) -> str:
    """The scores as a table to print, in percent."""
    rows = [(entry.type, entry.count, f"{entry.accuracy:.1%}", f"{entry.baseline:.1%}") for entry in scores]
    header = ("question type", "asked", "accuracy", "baseline")
    table = tabulate(rows, header, "plain", disable_numparse=True, colalign=("left", "right", "right", "right"))
    return f"{table}\n(baseline: always the most frequent training answer to the question as worded, or to its type)"


def _accuracy(answered: Sequence[tuple[Question, str]]) -> float:
    return sum(is_right(question, answer) for question, answer in answered) / len(answered)


def draw_dialogues(
    path: Path | str, dialogues: Sequence[tuple[Path, Sequence[tuple[Question, str]]]], title: str = ""
) -> None:
    """Draws images, each with its dialogue beside it, and writes them as one PNG.

    Right answers are green, wrong ones red with the right answer after them.

    Args:
        path: File to write.
        dialogues: An image, and the questions about it with their answers, for each; at least one.
        title: Text above them.
    """
    columns = min(2, len(dialogues))
    rows = -(-len(dialogues) // columns)
    figure = Figure(figsize=(6.4 * columns, 2.3 * rows + 0.6 * bool(title)), layout="constrained", dpi=120)
    if title:
        figure.suptitle(title, fontsize=15, weight="bold")
    panels = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[2, 3.6] * columns)
    for axes in panels.flat:
        axes.set_axis_off()
    for (left, right), (image, rounds) in zip(panels.reshape(-1, 2), dialogues, strict=False):
        with Image.open(image) as opened:
            left.imshow(opened.convert("RGB"), interpolation="lanczos")
        _write_rounds(right, rounds)
    with atomic_path(path) as aside:
        figure.savefig(aside, format="png")


def _write_rounds(axes: Axes, rounds: Sequence[tuple[Question, str]]) -> None:
    """Writes questions and answers from top to bottom."""
    height = 1 / max(len(rounds), 4)
    for index, (question, answer) in enumerate(rounds):
        top, right = 1 - index * height, is_right(question, answer)
        axes.text(0, top - 0.3 * height, _shorten(question.text, 52), color=_ASKED, fontsize=11, va="center")
        text = f"{'✓' if right else '✗'}  {_shorten(answer, 30) or '(nothing)'}"
        style = dict(color=RIGHT if right else WRONG, fontsize=12, weight="bold", va="center")
        said = axes.text(0.02, top - 0.7 * height, text, **style)
        if not right:
            style = dict(color=_ASKED, fontsize=10, va="center")
            axes.annotate(f"   right: {question.answer}", (1, 0.5), xycoords=said, **style)


def _shorten(text: str, most: int) -> str:
    """One line of at most `most` letters; dollar signs are not formulas."""
    line = " ".join(text.split())
    return (line if len(line) <= most else line[: most - 1] + "…").replace("$", r"\$")
