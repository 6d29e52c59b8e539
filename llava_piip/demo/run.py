"""From nothing to a small PIIP-LLaVA that answers questions about pictures it never saw, without a download.

    python -m llava_piip.demo               # goes on where an earlier call stopped
    python -m llava_piip.demo --restart     # starts from the beginning
    python -m llava_piip.demo --classifier output/demo/digits/model_final.pth    # sees with a trained classifier

Draws scenes of digits on photographs with questions about them, trains two vision branches as digit classifiers, and a
tokenizer and a small Llama on text. Joins them, and trains in two stages with llava_piip/train/train.py under the
deepspeed launcher, two processes on the CPU. Then the model answers questions about new pictures; in a terminal it
stays to chat.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from piip_core.checkpoints import read_checkpoint
from piip_core.errors import UserError
from piip_core.files import publish_folder, write_atomically

from ..assembly import assemble
from ..loading import FINAL
from ..modeling import PIIPLlavaForConditionalGeneration
from ..processing import PIIPLlavaProcessor
from .answering import answer_all, chat
from .dataset import ChatDataset, prepare_chat_dataset
from .drawing import Dialogue, draw_dialogues
from .language import train_language_model
from .questions import Question
from .scoring import format_scores, is_right, score
from .vision import (
    CLASSIFIER_TOKENS,
    PIXEL_MEAN,
    PIXEL_STD,
    chat_entry,
    chat_pyramid,
    classifier_pyramid,
    train_branches,
)

__all__ = ["main"]

_FOLDER = Path(__file__).resolve().parent
_ROOT = _FOLDER.parents[1]
_PROCESSES = 2
_DRAWN, _PRINTED = 12, 4  # dialogues
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
    _say("Scenes and questions", str(args.data))
    start = _make_start(args.output, data, args.classifier)
    common = ["--model", str(start), "--image_root", str(data.image_root), *args.overrides]
    projector = _train("stage1", args.output, [*common, "--annotations", str(data.captions)])
    own = ["--annotations", str(data.conversations), "--projector", str(projector)]
    final = _train("stage2", args.output, [*common, *own])
    model = PIIPLlavaForConditionalGeneration.from_pretrained(final, trust_remote_code=False)
    processor = PIIPLlavaProcessor.from_pretrained(final, trust_remote_code=False)
    _evaluate(args.output, model, processor, data)
    _say("Done", f"in {(time.monotonic() - began) / 60:.1f} minutes")
    if sys.stdin.isatty() and not args.no_chat:
        chat(model, processor, data.pictures())


def _make_start(output: Path, data: ChatDataset, classifier: Path | None) -> Path:
    """The model before the two stages: trained branches and language model, projectors at random."""
    branches, language, start = output / "branches", output / "language_model", output / "start"
    if classifier and branches.is_dir():
        raise UserError(f"{output}: holds a run that started without --classifier; name another --output, or --restart")
    if start.is_dir():
        return start
    if classifier:
        read_checkpoint(classifier)  # a wrong path shows before the language model is trained
        vision: dict[str, Any] = {"vision_checkpoint": classifier, "projector_grid": CLASSIFIER_TOKENS}
        entry = chat_entry(classifier_pyramid())
    else:
        _say("Branches", "two networks learn to tell single digits")
        results = train_branches(branches)
        for number, result in results.items():
            print(f"Branch {number}: {result.accuracy:.1%} of unseen digits")
        vision, entry = {}, chat_entry(chat_pyramid(results))
    _say("Language", "a tokenizer and a small Llama learn from text")
    loss = train_language_model(language, data.texts())
    print(f"Language model: {loss:.2f} per token of answers about pictures in words")
    model, processor = assemble(entry, language_model=language, **vision)
    processor.image_processor.image_mean, processor.image_processor.image_std = PIXEL_MEAN, PIXEL_STD
    with publish_folder(start) as aside:
        model.save_pretrained(aside)
        processor.save_pretrained(aside)
    return start


def _train(stage: str, output: Path, arguments: Sequence[str]) -> Path:
    """Runs a stage, or goes on with it, under the deepspeed launcher; the folder of what it trained."""
    run = output / stage
    if not (run / FINAL).is_dir():
        _say(stage, f"deepspeed {_TRAIN.relative_to(_ROOT)} on {_PROCESSES} processes, in {run}")
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(_PROCESSES), "-q"]
        preset, deepspeed = (str(_FOLDER / name) for name in (f"{stage}.yaml", "zero2.json"))
        settings = ["--preset", preset, "--deepspeed", deepspeed, "--output_dir", str(run), "--resume", "true"]
        command = [*launcher, "--master_port", str(_free_port()), str(_TRAIN), *settings, *arguments]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        status = subprocess.run(command, env=environment).returncode
        if status:
            raise UserError(f"{stage} stopped with exit status {status}, see above; the same command goes on with it")
    return run / FINAL


def _evaluate(
    output: Path, model: PIIPLlavaForConditionalGeneration, processor: PIIPLlavaProcessor, data: ChatDataset
) -> None:
    questions = data.validation_questions()
    answers = answer_all(model, processor, questions, data.image_root)
    scores = score(questions, answers, data.training_questions())
    with write_atomically(output / "scores.json", "w") as file:
        json.dump([asdict(entry) for entry in scores], file, indent=2)
    picture = output / "dialogues.png"
    dialogues = _dialogues(questions, answers, data)
    draw_dialogues(picture, dialogues, "Questions and pictures never seen in training")
    for dialogue in dialogues[:_PRINTED]:
        print(f"\n{dialogue.image or 'no picture'}")
        for question, answer in dialogue.rounds:
            print(f"  {question.text}  ->  {answer}" + ("" if is_right(question, answer) else f"  ({question.answer})"))
    print(f"\n{format_scores(scores)}")
    _say("Picture to open", str(picture))


def _dialogues(questions: Sequence[Question], answers: Sequence[str], data: ChatDataset) -> list[Dialogue]:
    """The questions about the first pictures, and their answers."""
    rounds: dict[str, list[tuple[Question, str]]] = {}
    for question, answer in zip(questions, answers, strict=True):
        rounds.setdefault(str(question.image), []).append((question, answer))
    return [Dialogue(data.image_root / image, asked) for image, asked in list(rounds.items())[:_DRAWN]]


def _free_port() -> int:
    """A port below those that the system itself hands out, which somebody else may get before the launcher binds it."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise UserError("no free port between 20000 and 32000 for the two processes to meet at")


def _say(title: str, text: str) -> None:
    print(f"== {title}: {text}", flush=True)
