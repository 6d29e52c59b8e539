#!/usr/bin/env python3
"""Measures the speed of PIIP's parts against baselines: medians, and in brackets their ratios to the baseline.

Examples:
    python tools/benchmark.py op --json op.json --chart op.png
    python tools/benchmark.py op --dtypes fp32 bf16 --cases 'T98<-S70'
    python tools/benchmark.py op --device cuda --batch 2
    python tools/benchmark.py backbone --json backbone.json --chart backbone.png
    python tools/benchmark.py backbone --models piip_sbl_1568_1120_672 --baseline vitdet_l --precisions bf16
    python tools/benchmark.py train --scale 0.5
    python tools/benchmark.py chat --device cuda --chart chat.png
    python tools/benchmark.py chat --divide-widths 4 --json chat.json
    python tools/benchmark.py chat --vision-only --published piip_llava_convnext_b_clip_l_1024_336_7b
    python tools/benchmark.py chat --model output/piip_llava --baseline output/llava_1_5
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from piip_core.errors import ConfigError, UserError
from piip_core.files import write_atomically
from piip_core.ops import operator_status
from piip_tools.benchmarks.operators import CASES, DTYPES, measure_operator
from piip_tools.timing import describe_machine, device_argument, draw_rows, format_rows

Rows = list[dict[str, Any]]


def add_operator_options(parser: argparse.ArgumentParser) -> None:
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="NAME", help=f"out of {names}")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])


def run_operator(args: argparse.Namespace) -> Rows:
    cases = [case for case in CASES if case.name in args.cases]
    return measure_operator(cases, args.dtypes, **machine_options(args))


def add_backbone_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        default=["piip_tsb_1568_1120_672", "piip_tsb_1120_896_448"],
        metavar="NAME",
        help="PIIP models, by the names of tools/analyze_model.py",
    )
    parser.add_argument("--forms", nargs="+", choices=("ours", "prepared", "cheap", "all"), help="of the PIIP models")
    parser.add_argument(
        "--neck", action="store_true", help="give PIIP the FPN of our detectors too, so that all maps have 256 channels"
    )
    parser.add_argument("--baseline", choices=("vitdet_b", "vitdet_l"), default="vitdet_b", help="of the ratios")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16", "amp"))
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all image sizes, for a quick look")


def run_backbones(args: argparse.Namespace) -> Rows:
    from piip_tools.benchmarks import backbones  # needs Detectron2, as the other commands do not

    models = backbones.piip_models(args.models, args.forms, scale=args.scale, neck=args.neck)
    models.append(backbones.vitdet(args.baseline, args.scale))
    training = args.command == "train"
    return backbones.measure_backbones(models, args.precisions, training=training, **machine_options(args))


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--published",
        default="piip_llava_clip_bl_512_256_7b",
        metavar="NAME",
        help="a published model, built with random weights; the baseline is the LLaVA-1.5 of its size",
    )
    parser.add_argument(
        "--divide-widths",
        type=int,
        default=1,
        metavar="N",
        help="make both models narrower; 4 fits a small machine. Image sizes, tokens and depths stay",
    )
    parser.add_argument(
        "--visual-grid",
        type=int,
        metavar="N",
        help="give ours N x N visual tokens instead of the published number; the baseline has 24 x 24",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="a trained or converted model instead of --published")
    parser.add_argument("--baseline", type=Path, metavar="DIR", help="with --model: the other one")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=32, help="of the first answer")
    parser.add_argument("--vision-only", action="store_true", help="the vision encoders alone")


def run_chat(args: argparse.Namespace) -> Rows:
    from piip_tools.benchmarks import chat

    if (args.model is None) != (args.baseline is None):
        raise ConfigError("--model and --baseline: expected both or none")
    if args.model is None:
        pair = chat.build_pair(
            args.published,
            device=args.device,
            dtype=getattr(torch, args.dtype),
            divide_widths=args.divide_widths,
            projector_grid=args.visual_grid,
            language=not args.vision_only,
        )
    else:
        pair = chat.load_pair(args.model, args.baseline, device=args.device, dtype=args.dtype)
    options = {name: getattr(args, name) for name in ("new_tokens", "repeats", "threads", "vision_only")}
    return chat.measure_chat(pair, **options)


def machine_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("device", "batch", "repeats", "threads")}


COMMANDS = {
    "op": ("Deformable attention", add_operator_options, {"run": run_operator, "repeats": 15}),
    "backbone": (
        "Forward passes of PIIP backbones and ViTDet",
        add_backbone_options,
        {"run": run_backbones, "repeats": 5, "forms": ["ours", "prepared"], "precisions": ["fp32", "bf16"]},
    ),
    "train": (
        "Training steps of PIIP backbones and ViTDet",
        add_backbone_options,
        {"run": run_backbones, "repeats": 3, "forms": ["ours"], "precisions": ["fp32", "amp"]},
    ),
    "chat": ("PIIP-LLaVA and LLaVA-1.5", add_chat_options, {"run": run_chat, "repeats": 5}),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (title, add_options, defaults) in COMMANDS.items():
        command = commands.add_parser(
            name, help=title, description=title, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        add_options(command)
        if name != "chat":
            command.add_argument("--batch", type=int, default=1, help="images")
        command.add_argument("--device", type=device_argument, default="cpu", help="cpu or cuda")
        command.add_argument("--threads", type=int, default=1, help="CPU threads; 1 measures CPU time, more wall time")
        command.add_argument("--repeats", type=int, help="the median of so many is reported")
        command.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
        command.add_argument("--chart", type=Path, metavar="FILE", help="also draw the ratios into FILE (.png, .svg)")
        command.set_defaults(title=title, **defaults)
    args = parser.parse_args()
    for option in ("batch", "threads", "repeats"):
        if getattr(args, option, 1) < 1:
            parser.error(f"--{option} {getattr(args, option)}: expected 1 or more")
    if args.command == "train" and "prepared" in args.forms:
        parser.error("--forms prepared is of forward passes: expected the command backbone")
    return args


def main() -> None:
    args = parse_args()
    try:
        rows = args.run(args)
    except UserError as error:
        sys.exit(f"benchmark: {error}")
    machine = describe_machine(args.device, args.threads)
    note = f"{machine}, medians of {args.repeats}, kernels of the operator: {operator_status.cpu_capability or 'none'}"
    print(f"{note}\n{format_rows(rows)}")
    if args.chart:
        figure = draw_rows(rows, f"{args.title}\n{note}")
        with write_atomically(args.chart) as file:
            figure.savefig(file, format=args.chart.suffix[1:], dpi=120)
    if args.json:
        with write_atomically(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
