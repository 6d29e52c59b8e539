"""Answers the questions of benchmarks with a model, scores the answers, and writes what servers want.

    python -m llava_piip.eval pope --model MODEL --data DATA
    python -m llava_piip.eval all --model MODEL --data DATA --output output/eval/my_model
    torchrun --nproc_per_node 8 -m llava_piip.eval all --model MODEL --data DATA     # one process per GPU
    python -m llava_piip.eval pope --data DATA --answers answers.jsonl    # scores answers that are there
    python -m llava_piip.eval table output/eval/my_model --set mmvet=31.2 vqav2=79.1

The same command goes on where an earlier one was stopped. docs/evaluation.md says what DATA holds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

from accelerate import PartialState
from tabulate import tabulate

from piip_core import zoo
from piip_core.errors import UserError

from ..inference import DTYPES, ChatModel
from . import BENCHMARKS, find_benchmarks
from .benchmark import SOURCES, Benchmark, EvalError, read_json
from .running import SCORES, answer_benchmark, default_dtype, score_answers

_TABLE = "table"
_LONGEST_WAIT = timedelta(days=7)  # of a process for the others


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; see `--help`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments[:1] == [_TABLE]:
            _table(arguments[1:])
        else:
            _evaluate(_parse(arguments))
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on.", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llava_piip.eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = f"{', '.join(BENCHMARKS)}, all, or {_TABLE}"
    parser.add_argument("benchmarks", nargs="+", choices=[*BENCHMARKS, "all"], metavar="BENCHMARK", help=names)
    parser.add_argument("--model", type=Path, metavar="DIR", help="what training saved, or a released model")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of all benchmarks")
    parser.add_argument("--output", type=Path, metavar="DIR", help="results (default: output/eval/NAME OF THE MODEL)")
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="questions at once (default 1, as published)"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read images (default 2)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float16 on a GPU (as published), else float32")
    parser.add_argument("--cpu", action="store_true", help="leave GPUs alone")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="score this file; no model is needed")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="question file, instead of the one below --data")
    parser.add_argument("--images", type=Path, metavar="DIR", help="image folder, instead of the one below --data")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions, to try things")
    parser.add_argument("--partial", action="store_true", help="score answers that are incomplete")
    parser.add_argument("--restart", action="store_true", help="forget earlier answers instead of going on with them")
    args = parser.parse_args(arguments)
    args.benchmarks = find_benchmarks(args.benchmarks)
    if len(args.benchmarks) > 1 and (args.answers or args.questions or args.images):
        parser.error("--answers, --questions and --images are for a single benchmark")
    if (args.model is None) == (args.answers is None):
        parser.error("expected --model, to answer questions with it, or --answers, to score a file")
    for name, least in (("batch_size", 1), ("workers", 0), ("limit", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    for name in ("questions", "images"):  # absolute paths stay what they are below --data
        if path := getattr(args, name):
            args.benchmarks = [replace(args.benchmarks[0], **{name: str(path.resolve())})]
    released = {model.name for model in zoo.released_models()}
    if args.model is not None and not args.model.is_dir() and str(args.model) not in released:
        parser.error(f"--model {args.model}: is no folder, and no released model")
    if args.output is None:
        args.output = Path("output", "eval", args.model.resolve().name if args.model else args.answers.stem)
    return args


def _evaluate(args: argparse.Namespace) -> None:
    _check_files(args)
    if args.answers is not None:
        _report(args.benchmarks[0], args, args.answers)
        return
    state = PartialState(cpu=args.cpu, timeout=_LONGEST_WAIT)
    try:
        args.dtype = args.dtype or default_dtype(state.device)
        model = ChatModel.load(args.model, device=state.device, dtype=args.dtype)
        for benchmark in args.benchmarks:
            answers = answer_benchmark(benchmark, args, state, model)
            if state.is_main_process:
                _report(benchmark, args, answers)
        if state.is_main_process and len(args.benchmarks) > 1 and args.limit is None:
            print(f"\n{score_table({args.output.name: measured_scores(args.output)})}")
    finally:
        state.destroy_process_group()


def _check_files(args: argparse.Namespace) -> None:
    """Stops before hours of work if files or packages are missing."""
    missing: list[Path] = []
    for benchmark in args.benchmarks:
        if absent := [name for name in benchmark.needs if find_spec(name) is None]:
            raise EvalError(f"{benchmark.title} needs {' '.join(absent)}: pip install {' '.join(absent)}")
        missing += benchmark.missing_files(args.data, with_images=args.answers is None)
    if missing:
        listed = "\n  ".join(map(str, missing))
        raise EvalError(f"files or folders are missing ({SOURCES}):\n  {listed}")


def _report(benchmark: Benchmark, args: argparse.Namespace, answers: Path) -> None:
    """Scores, and says what came out."""
    score, written = score_answers(benchmark, args, answers)
    print(f"\n{benchmark.title}\n  answers: {answers}")
    if score is not None:
        print("\n".join(f"  {line}" for line in score.lines))
        if score.value is not None:
            print(f"  {benchmark.title}: {score.value:.1f}")
    if written is not None:
        print(f"  {f'to send to {benchmark.remote}' if benchmark.remote else 'for the official script'}: {written}")


def _table(arguments: Sequence[str]) -> None:
    """Prints the published scores and measured ones."""
    parser = argparse.ArgumentParser(
        prog=f"python -m llava_piip.eval {_TABLE}", description="Prints the published scores, and yours below them."
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="DIR", help="--output of evaluations")
    scores = parser.add_argument("--set", nargs="+", default=[], type=_named_score, metavar="NAME=SCORE")
    scores.help = "scores of one run that came from a server"
    parser.add_argument("--row", nargs="+", metavar="NAME", help="published rows to show, such as that of your model")
    args = parser.parse_args(arguments)
    if args.set and len(args.runs) != 1:
        parser.error("--set: expected one run that the scores belong to")
    names = [run.resolve().name for run in args.runs]
    if len(set(names)) < len(names):  # as training calls them all "final"
        names = [str(run) for run in args.runs]
    measured = {name: measured_scores(run) | dict(args.set) for name, run in zip(names, args.runs, strict=True)}
    print(score_table(measured or None, args.row))


def _named_score(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return BENCHMARKS[name].name, float(value)
    except (KeyError, ValueError):
        message = f"{text!r}: expected NAME=SCORE, such as vqav2=79.1, with one of {', '.join(BENCHMARKS)}"
        raise argparse.ArgumentTypeError(message) from None


def measured_scores(output: Path) -> dict[str, float]:
    """Scores in a folder of results, by benchmark; those that are scored elsewhere are not there."""
    files = {name: output / name / SCORES for name in BENCHMARKS}
    contents = {name: read_json(path) for name, path in files.items() if path.exists()}
    found = {name: content["value"] for name, content in contents.items() if content["complete"]}
    if not found:
        raise EvalError(f"{output}: has no scores of complete runs; expected BENCHMARK/{SCORES} below it")
    return {name: value for name, value in found.items() if value is not None}


def score_table(measured: Mapping[str, Mapping[str, float]] | None = None, rows: Sequence[str] | None = None) -> str:
    """The published rows of the zoo (those named, or all), and those of measured models."""
    entries = zoo.multimodal_entries() if rows is None else [zoo.multimodal(name) for name in rows]
    lines = []
    for entry in entries:
        model = (entry.title, entry.resolution, entry.language_model.rpartition("/")[2])
        lines.append([*model, *map(_printed, astuple(entry.scores))])
    for name, values in (measured or {"yours": {}}).items():
        scores = [values.get(name) for name in BENCHMARKS]
        mean = None if None in scores else sum(scores) / len(scores)
        lines.append([f"**{name}**", "", "", *map(_printed, (*scores, mean))])
    header = ("model", "image", "language model", *(benchmark.title for benchmark in BENCHMARKS.values()), "mean")
    return tabulate(lines, header, "github", disable_numparse=True)


def _printed(score: float | None) -> str:
    return "" if score is None else f"{score:.1f}"


if __name__ == "__main__":
    sys.exit(main())
