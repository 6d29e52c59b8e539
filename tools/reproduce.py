#!/usr/bin/env python
"""Evaluates released models and compares them with the published numbers.

Examples:
    python tools/reproduce.py mask_rcnn_piip_tsb_1568_1120_672 --coco DIR --gpus 8
    python tools/reproduce.py --all --coco DIR --ade20k DIR --imagenet DIR --chat DIR --gpus 8
    python tools/reproduce.py piip_llava_clip_bl_512_256_7b --chat DIR --benchmarks pope gqa
    python tools/reproduce.py mask_rcnn_piip_tsb_1568_1120_672 --coco DIR data.test.annotations=some_of_them.json

Each model is downloaded, converted, evaluated as published and written to OUTPUT/NAME/reproduced.json, with what
differs from the published evaluation. `python -m piip_core.zoo` lists the names; --all takes every released model
whose data are given. The same command goes on where an earlier one stopped. A model that does not fit into the memory
is left out, by an estimate of weights and activations before anything is downloaded.

Units: AP, mIoU, accuracies and scores in percent.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from piip_core import zoo
from piip_core.checkpoints.released import fetch_released, read_record
from piip_core.errors import ConfigError, UserError, listed
from piip_core.files import read_json, write_atomically
from piip_tools.memory.estimate import GIB, RESERVE
from piip_tools.memory.evaluation import chat_memory, detectron2_memory

ROOT = Path(__file__).resolve().parent.parent
TRAIN, CONFIGS = ROOT / "tools/lazyconfig_train_net.py", ROOT / "projects/PIIP/configs"
RESULT = "reproduced.json"
# Where our evaluation writes a number of the zoo
_METRICS = {
    "box_ap": ("bbox", "AP"),
    "mask_ap": ("segm", "AP"),
    "miou": ("sem_seg", "mIoU"),
    "top1": ("classification", "top1"),
}
# The test sets below their folders, as overrides of a LazyConfig
_TEST_SETS = {
    "coco": {"annotations": "annotations/instances_val2017.json", "images": "val2017"},
    "ade20k": {"images": "images/validation", "labels": "annotations/validation"},
    "imagenet": {"images": "val"},
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="of a released model; key=value overrides a LazyConfig"
    )
    parser.add_argument("--all", action="store_true", help="every released model whose data are given")
    data = parser.add_argument_group("data, as datasets/README.md and docs/evaluation.md lay them out")
    data.add_argument("--coco", type=Path, metavar="DIR", help="holds annotations/ and val2017/")
    data.add_argument("--ade20k", type=Path, metavar="DIR", help="holds images/validation and annotations/validation")
    data.add_argument("--imagenet", type=Path, metavar="DIR", help="holds val/, with a sub-folder per class")
    data.add_argument("--chat", type=Path, metavar="DIR", help="holds a folder per benchmark")
    parser.add_argument("--benchmarks", nargs="+", default=["all"], help="of chat models (default: the eight)")
    parser.add_argument("--output", type=Path, default=Path("output/reproduce"), metavar="DIR")
    parser.add_argument("--gpus", type=int, default=1, help="processes, one per GPU (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    precision = parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"))
    precision.help = "of backbones, or of whole chat models (default: float32; of chat models on a GPU float16)"
    parser.add_argument("--memory", type=float, metavar="GIB", help="of each GPU, or of the machine (default: asked)")
    parser.add_argument("--restart", action="store_true", help="evaluate again what was evaluated before")
    args = parser.parse_intermixed_args(argv)
    args.overrides = [name for name in args.names if "=" in name]
    args.names = [name for name in args.names if "=" not in name]
    if bool(args.names) == args.all:
        parser.error("expected names of released models, or --all")
    if args.gpus < 1:
        parser.error(f"--gpus {args.gpus}: expected at least 1")
    if args.memory is None:
        args.memory = available_memory(args.device)
    return args


def available_memory(device: str) -> float:
    """GiB of a GPU, or of this machine for all processes together."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB


def data_option(released: zoo.Released) -> str:
    """The option that gives the data of a model."""
    if isinstance(released.entry, zoo.MultimodalEntry):
        return "chat"
    if isinstance(released.entry, zoo.ClassificationEntry):
        return "imagenet"
    return "ade20k" if released.entry.head == "upernet" else "coco"


def precision_of(released: zoo.Released, args: argparse.Namespace) -> str:
    """What the backbone, or a whole chat model, computes in."""
    half = args.device == "cuda" and data_option(released) == "chat"
    return args.precision or ("float16" if half else "float32")


def choices(released: zoo.Released, args: argparse.Namespace) -> list[str]:
    """In what the evaluation differs from the published one, and in what it does not though one might think so."""
    precision = precision_of(released, args)
    if data_option(released) == "chat":
        return [f"precision: {precision} (published: float16)", "one question at a time and greedy, as published"]
    common = "images decoded by Pillow (published: OpenCV); their resizing is the published one to the last bit"
    if data_option(released) == "imagenet":
        return [f"precision: {precision} (published: not known)", "bicubic resizing by Pillow, as published"]
    backbone = f"backbone in {precision} (published: half precision unless a flag said otherwise, which is not known)"
    return [backbone, "neck and heads in float32, as published", common]


def needed_memory(released: zoo.Released, args: argparse.Namespace) -> float:
    """GiB that a process needs, and the part left free."""
    precision = precision_of(released, args)
    if data_option(released) == "chat":
        needed = chat_memory(released.name, getattr(torch, precision))
    else:
        cfg, _ = lazy_config(released, args)
        needed = detectron2_memory(cfg, precision="fp32" if precision == "float32" else "bf16")
    processes = args.gpus if args.device == "cpu" else 1
    return needed * processes / (1 - RESERVE) / GIB


def lazy_config(released: zoo.Released, args: argparse.Namespace) -> tuple[Any, list[str]]:
    """A model's LazyConfig, and the overrides that make it evaluate on the data given."""
    from piip.lazy_config import load_config

    option = data_option(released)
    folder = getattr(args, option).absolute()
    overrides = [f"data.test.{key}={folder / path}" for key, path in _TEST_SETS[option].items()]
    overrides += [f"train.device={args.device}", f"train.eval_precision={precision_of(released, args)}"]
    if option != "imagenet":
        overrides.append("train.amp.float32_heads=True")
    overrides += args.overrides
    return load_config(str(CONFIGS / released.entry.config_file), overrides), overrides


def check_data(released: zoo.Released, args: argparse.Namespace) -> None:
    """Looks at what the evaluation will read, before anything is downloaded.

    Raises:
        UserError: If files, folders or benchmarks are missing.
    """
    if data_option(released) == "chat":
        from llava_piip.eval import find_benchmarks

        missing = [str(path) for one in find_benchmarks(args.benchmarks) for path in one.missing_files(args.chat)]
        if missing:
            raise ConfigError(f"--chat {args.chat}: missing are {listed(missing)}; docs/evaluation.md lays them out")
        return
    from piip.lazy_config import check_folders, follow_annotations

    cfg, _ = lazy_config(released, args)
    follow_annotations(cfg, training=False)
    check_folders(cfg, training=False)


def evaluate(released: zoo.Released, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Evaluates a model in processes of its own, and returns the numbers of the zoo that come out."""
    if data_option(released) == "chat":
        from llava_piip.checkpoints import fetch_released as fetch_chat
        from llava_piip.eval.__main__ import measured_scores

        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.gpus)]
        command += ["-m", "llava_piip.eval", *args.benchmarks, "--model", str(fetch_chat(released.name))]
        command += ["--data", str(args.chat), "--output", str(folder), "--dtype", precision_of(released, args)]
        run_python([*command, *(["--cpu"] if args.device == "cpu" else []), *(["--restart"] if args.restart else [])])
        return measured_scores(folder)
    from piip.train import EVALUATION

    _, overrides = lazy_config(released, args)
    command = [str(TRAIN), "--eval-only", "--config-file", str(CONFIGS / released.entry.config_file)]
    command += ["--num-gpus", str(args.gpus), f"train.init_checkpoint={fetch_released(released.name)}"]
    run_python([*command, f"train.output_dir={folder}", *overrides])
    results = read_json(folder / EVALUATION)
    return {name: results[task][key] for name, (task, key) in _METRICS.items() if task in results}


def run_python(arguments: list[str]) -> None:
    """Runs a process of its own.

    Raises:
        UserError: If it fails; it has said why.
    """
    code = subprocess.run([sys.executable, *arguments], check=False).returncode
    if code:
        raise UserError(f"the evaluation above ended with exit status {code}")


def numbers(released: zoo.Released) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """What the public repository prints, and what the paper prints where that differs."""
    entry = released.entry
    if isinstance(entry, zoo.MultimodalEntry):
        return asdict(entry.scores), {}
    return asdict(entry.published), asdict(entry.paper) if isinstance(entry, zoo.ZooEntry) else {}


def compare(released: zoo.Released, ours: dict[str, float]) -> list[dict[str, Any]]:
    """Our numbers beside the published ones, and the difference to those of the public repository.

    Raises:
        UserError: If a number is none.
    """
    published, paper = numbers(released)
    rows = []
    for metric, value in ours.items():
        if math.isnan(value):
            raise UserError(f"{metric} is no number: the model found nothing on these data")
        printed = published.get(metric)
        difference = None if printed is None else value - printed
        rows.append(
            {
                "metric": metric,
                "ours": value,
                "published": printed,
                "paper": paper.get(metric),
                "difference": difference,
            }
        )
    return rows


def table(results: Sequence[dict[str, Any]]) -> str:
    """All comparisons, a line per number."""
    rows = [
        [result["name"], row["metric"], *(_printed(row[key]) for key in ("ours", "published", "paper")),
         _printed(row["difference"], "+.2f")]
        for result in results
        for row in result["numbers"]
    ]  # fmt: skip
    header = ("model", "metric", "ours", "published", "paper", "difference")
    return tabulate(rows, header, "github", disable_numparse=True)


def _printed(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def reproduce(released: zoo.Released, args: argparse.Namespace) -> dict[str, Any]:
    """The result of a model: as it was written before, or evaluated now."""
    folder = args.output / released.name
    option = data_option(released)
    settings = {"data": str(getattr(args, option).absolute()), "precision": precision_of(released, args)}
    settings |= {"benchmarks": args.benchmarks} if option == "chat" else {"overrides": args.overrides}
    if (folder / RESULT).is_file() and not args.restart:
        result = read_json(folder / RESULT)
        if result["settings"] == settings:
            print(f"{released.name}: was evaluated on {result['date']} ({folder / RESULT})")
            return result
    check_data(released, args)
    needed = needed_memory(released, args)
    if needed > args.memory:
        raise ConfigError(
            f"needs {needed:.1f} GiB by estimate, of {args.memory:.1f}: use a larger GPU, or fewer processes on a CPU"
        )
    differences = choices(released, args)
    print(f"{released.name}: {released.url}, {needed:.1f} GiB by estimate", *differences, sep="\n  ", flush=True)
    start = time.time()
    ours = evaluate(released, args, folder)
    result = {
        "name": released.name,
        "numbers": compare(released, ours),
        "evaluation": differences,
        "settings": settings,
        "checkpoint": read_record(released),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "processes": args.gpus,
        "seconds": round(time.time() - start, 1),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("piip", "torch", "timm")},
    }
    with write_atomically(folder / RESULT, "w") as file:
        json.dump(result, file, indent=2)
    return result


def selected(args: argparse.Namespace) -> Iterator[zoo.Released]:
    """The models to evaluate.

    Raises:
        ConfigError: If one is unknown, or its data are not given.
    """
    for released in zoo.released_models() if args.all else map(zoo.released, args.names):
        option = data_option(released)
        folder = getattr(args, option)
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"--{option} {folder}: no such folder")
        if folder is not None:
            yield released
        elif not args.all:
            raise ConfigError(f"{released.name}: its data are not given: expected --{option} DIR")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    results, left_out = [], []
    try:
        models = list(selected(args))
        if not models:
            raise ConfigError("--all: no data are given: expected --coco, --ade20k, --imagenet or --chat DIR")
        for number, released in enumerate(models, 1):
            print(f"\n[{number}/{len(models)}] {released.name}", flush=True)
            try:
                results.append(reproduce(released, args))
            except UserError as error:
                left_out.append(f"{released.name}: {str(error).removeprefix(released.name).lstrip(': ')}")
                print(left_out[-1], file=sys.stderr, flush=True)
    except UserError as error:
        sys.exit(f"reproduce: {error}")
    if results:
        print(f"\n{table(results)}\n\nWritten to {args.output}/NAME/{RESULT}")
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
