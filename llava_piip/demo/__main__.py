"""From nothing to a small PIIP-LLaVA that answers questions about images it never saw, without a download.

    python -m llava_piip.demo               # goes on where an earlier call stopped
    python -m llava_piip.demo --restart     # starts from the beginning
    python -m llava_piip.demo --classifier output/demo/digits/model_final.pth    # sees with a trained classifier

Draws scenes of digits on photographs with questions about them, trains two vision branches as digit classifiers, and a
tokenizer and a small Llama on text. Joins them, and trains in two stages with llava_piip/train/train.py under the
deepspeed launcher, two processes on the CPU. Then the model answers questions about new images; in a terminal it
stays to chat.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from piip_core.checkpoints import read_checkpoint
from piip_core.errors import UserError
from piip_core.files import publish_folder, write_atomically

from ..assembly import assemble
from ..conversation import IMAGE_TAG, Messages
from ..data.images import read_image
from ..inference import ChatModel
from ..loading import FINAL
from ..serve.chat import Terminal
from ..serve.dialogue import Conversation, open_image
from .dataset import NUM_TEXTS, ChatDataset, imagine_conversations, prepare_chat_dataset
from .language import train_language_model
from .questions import QUESTION_TYPES, Question
from .vision import PIXEL_MEAN, PIXEL_STD, chat_entry, chat_pyramid, classifier_pyramid, train_branches

_FOLDER = Path(__file__).resolve().parent
_ROOT = _FOLDER.parents[1]
_PROCESSES = 2
_MOST_TOKENS = 48  # of an answer
_PRINTED = 8  # dialogues
_TRAIN = _ROOT / "llava_piip" / "train" / "train.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_piip.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder of the run (default output/chat_demo[_classifier])")
    parser.add_argument("--data", type=Path, default=_ROOT / "datasets" / "digit_chat", help="folder of the data set")
    parser.add_argument(
        "--classifier",
        type=Path,
        metavar="FILE",
        help="weights of projects/PIIP/configs/demo/piip_digits_classifier.py: the vision tower is its pyramid and "
        "starts from them, instead of two branches that learn digits here",
    )
    parser.add_argument("--restart", action="store_true", help="forget an earlier run instead of going on with it")
    parser.add_argument("--no-chat", action="store_true", help="end after the scores, in a terminal too")
    parser.add_argument("overrides", nargs="*", metavar="-- --key value", help="changes to both stages of training")
    args = parser.parse_args(arguments)
    if args.output is None:
        args.output = _ROOT / "output" / ("chat_demo_classifier" if args.classifier else "chat_demo")
    try:
        if args.restart:
            shutil.rmtree(args.output, ignore_errors=True)
        _run(args)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    began = time.monotonic()
    data = prepare_chat_dataset(args.data)
    _print_step("Scenes and questions", str(args.data))
    start = _make_start(args.output, args.classifier)
    common = ["--model", str(start), "--image_root", str(data.image_root), *args.overrides]
    projector = _train_stage("stage1", args.output, [*common, "--annotations", str(data.captions)])
    own = ["--annotations", str(data.conversations), "--projector", str(projector)]
    final = _train_stage("stage2", args.output, [*common, *own])
    chat = ChatModel.load(final, device="cpu")
    _evaluate(args.output, chat, data)
    _print_step("Done", f"in {(time.monotonic() - began) / 60:.1f} minutes")
    if sys.stdin.isatty() and not args.no_chat:
        first, second = map(str, islice(data.images(), 2))
        print(f"The image is {first} (open it beside this window). /reset and /image FILE take another: {second} ...")
        Terminal(chat, Conversation(pending=[(first, open_image(first))]), {"max_new_tokens": _MOST_TOKENS}).run()


def _make_start(output: Path, classifier: Path | None) -> Path:
    """The model before the two stages: trained branches and language model, projectors at random."""
    branches, language, start = output / "branches", output / "language_model", output / "start"
    if classifier and branches.is_dir():
        raise UserError(f"{output}: holds a run that started without --classifier; name another --output, or --restart")
    if start.is_dir():
        return start
    if classifier:
        read_checkpoint(classifier)  # a wrong path shows before the language model is trained
        # Tokens: the grid of Branch 1, a quarter of all cells
        vision: dict[str, Any] = {"vision_checkpoint": classifier, "projector_grid": 8}
        pyramid = classifier_pyramid()
    else:
        _print_step("Branches", "two networks learn to tell single digits")
        for number, accuracy in enumerate(train_branches(branches), 1):
            print(f"Branch {number}: {accuracy:.1%} of unseen digits")
        vision, pyramid = {}, chat_pyramid(branches)
    _print_step("Language", "a tokenizer and a small Llama learn from text")
    loss = train_language_model(language, imagine_conversations(NUM_TEXTS))
    print(f"Language model: {loss:.2f} per token of answers about images in words")
    model, processor = assemble(chat_entry(pyramid), language_model=language, **vision)
    processor.image_processor.image_mean, processor.image_processor.image_std = PIXEL_MEAN, PIXEL_STD
    with publish_folder(start) as aside:
        model.save_pretrained(aside)
        processor.save_pretrained(aside)
    return start


def _train_stage(stage: str, output: Path, arguments: Sequence[str]) -> Path:
    """Runs a stage, or goes on with it, under the deepspeed launcher; the folder of what it trained."""
    run = output / stage
    if not (run / FINAL).is_dir():
        _print_step(stage, f"deepspeed {_TRAIN.relative_to(_ROOT)} on {_PROCESSES} processes, in {run}")
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(_PROCESSES), "-q"]
        preset, deepspeed = (str(_FOLDER / name) for name in (f"{stage}.yaml", "zero2.json"))
        settings = [preset, "--deepspeed", deepspeed, "--output_dir", str(run), "--resume", "true"]
        with socket.create_server(("127.0.0.1", 0)) as probe:  # for the two processes to meet at
            port = str(probe.getsockname()[1])
        command = [*launcher, "--master_port", port, str(_TRAIN), *settings, *arguments]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        status = subprocess.run(command, env=environment).returncode
        if status:
            raise UserError(f"{stage} stopped with exit status {status}, see above; the same command goes on with it")
    return run / FINAL


def _evaluate(output: Path, chat: ChatModel, data: ChatDataset) -> None:
    questions = data.validation_questions()
    answers = answer_all(chat, questions, data.image_root)
    scores = score(questions, answers, data.training_questions())
    with write_atomically(output / "scores.json", "w") as file:
        json.dump([entry._asdict() for entry in scores], file, indent=2)
    dialogues = groupby(zip(questions, answers, strict=True), lambda pair: pair[0].image)
    for image, asked in islice(dialogues, _PRINTED):
        print(f"\n{data.image_root / image}")
        for question, answer in asked:
            print(f"  {question.text}  ->  {answer}" + ("" if is_right(question, answer) else f"  ({question.answer})"))
    print(f"\n{format_scores(scores)}")


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
        answers += chat.answer(batch, max_new_tokens=_MOST_TOKENS)
    return answers


def _conversation(question: Question, image_root: Path) -> tuple[Messages, list[Image.Image]]:
    if question.image is None:
        return [{"role": "user", "content": question.text}], []
    image = read_image(image_root / question.image, question.image, as_viewed=True)
    return [{"role": "user", "content": f"{IMAGE_TAG}\n{question.text}"}], [image]


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


def _print_step(title: str, text: str) -> None:
    print(f"== {title}: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
