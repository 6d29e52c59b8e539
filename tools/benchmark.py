#!/usr/bin/env python3
"""Measures the speed of PIIP's parts.

Examples:
    python tools/benchmark.py op --json op.json --picture op.png
    python tools/benchmark.py op --dtypes fp32 bf16 --cases 'T98<-S70' --peers
    python tools/benchmark.py op --device cuda --batch 2 --unfused
    python tools/benchmark.py backbone --json backbone.json --picture backbone.png
    python tools/benchmark.py backbone --models piip_sbl_1568_1120_672 --peer vitdet_l --precisions bf16 --breakdown
    python tools/benchmark.py train --scale 0.5
    python tools/benchmark.py chat --device cuda --picture chat.png
    python tools/benchmark.py chat --divide-widths 4 --json chat.json
    python tools/benchmark.py chat --vision-only --row piip_llava_convnext_b_clip_l_1024_336_7b
    python tools/benchmark.py chat --model output/piip_llava --baseline output/llava_1_5
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from piip_core import zoo
from piip_core.errors import ConfigError, UserError
from piip_core.files import write_atomically
from piip_core.ops import operator_status
from piip_tools import backbone_benchmark as backbone_benchmark
from piip_tools import operator_benchmark as op_benchmark

PEERS = ("vitdet_b", "vitdet_l")


def add_op_command(commands: Any) -> None:
    parser = commands.add_parser(
        "op",
        help="deformable attention against the same by others",
        description="Forward and backward of deformable attention, with its softmax and locations, against the same in "
        "PyTorch and in other implementations. The sides take turns in one process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = [case.name for case in op_benchmark.CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="NAME", help=f"out of {names}")
    parser.add_argument("--dtypes", nargs="+", choices=list(op_benchmark.DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 measures CPU time, more wall time")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15, help="the median of so many is reported")
    parser.add_argument(
        "--unfused", action="store_true", help="time the sampling alone, from given locations and weights"
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=list(op_benchmark.PEERS),
        help="other implementations to time too; without this option those that are installed",
    )
    parser.add_argument(
        "--baseline-in-float32",
        action="store_true",
        help="run the PyTorch side of 16-bit cases in float32, which is faster on CPUs than in the dtype itself",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw the results into FILE (.png, .svg)")
    parser.set_defaults(run=run_op)


def run_op(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    timings = op_benchmark.run_benchmark(
        [case for case in op_benchmark.CASES if case.name in args.cases],
        args.dtypes,
        device=args.device,
        batch=args.batch,
        repeats=args.repeats,
        threads=args.threads,
        fused=not args.unfused,
        peers=op_benchmark.find_peers(args.device) if args.peers is None else args.peers,
        baseline_in_float32=args.baseline_in_float32,
    )
    where = f"{args.device}, {args.threads} thread(s)" if args.device == "cpu" else args.device
    if args.picture:
        figure = op_benchmark.draw_timings(timings, f"Deformable attention, batch {args.batch}, {where}")
        _save(figure, args.picture)
    copy = statistics.median(timing.copy_bytes_per_second for timing in timings)
    header = (
        f"operator: {operator_status.reason} (CPU kernels: {operator_status.cpu_capability}); {where}; medians of "
        f"{args.repeats}; a copy reads and writes {1e-9 * copy:.1f} GB/s"
    )
    return f"{header}\n{op_benchmark.format_table(timings)}", [timing.to_dict() for timing in timings]


def add_chat_command(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="PIIP-LLaVA against LLaVA-1.5 around the same language model",
        description="Time to the first token with the vision encoder's share, tokens per second, memory, and what is "
        "gained at a second question by keeping what was computed for the first one: PIIP-LLaVA against LLaVA-1.5.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    rows = [entry.name for entry in zoo.multimodal_entries() if entry.feature_block is None]
    parser.add_argument(
        "--row", choices=rows, default=rows[0], metavar="NAME", help=f"random weights, built like one of {rows}"
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
    parser.add_argument("--model", type=Path, metavar="DIR", help="a trained or converted model instead of --row")
    parser.add_argument("--baseline", type=Path, metavar="DIR", help="with --model: the other one")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 measures CPU time, more wall time")
    parser.add_argument("--repeats", type=int, default=5, help="the median of so many is reported")
    parser.add_argument("--text-tokens", type=int, default=64, help="of the first question, the template included")
    parser.add_argument("--new-tokens", type=int, default=32, help="of the first answer")
    parser.add_argument("--question-tokens", type=int, default=24, help="of the second question")
    parser.add_argument("--vision-only", action="store_true", help="the vision encoders alone")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="also draw the results")
    parser.set_defaults(run=run_chat)


def run_chat(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    import torch

    from piip_tools import chat_benchmark as chat_benchmark

    if (args.model is None) != (args.baseline is None):
        raise ConfigError("--model and --baseline: expected both or none")
    if args.picture and args.vision_only:
        raise ConfigError("--picture shows the time to the first token: expected no --vision-only")
    if args.model is None:
        dtype = getattr(torch, args.dtype)
        sides = chat_benchmark.published_pair(
            args.row,
            device=args.device,
            dtype=dtype,
            divide_widths=args.divide_widths,
            projector_grid=args.visual_grid,
            language=not args.vision_only,
        )
    else:
        sides = chat_benchmark.load_pair(args.model, args.baseline, device=args.device, dtype=args.dtype)
    results = chat_benchmark.compare(
        sides,
        chat_benchmark.Workload(
            text_tokens=args.text_tokens, new_tokens=args.new_tokens, question_tokens=args.question_tokens
        ),
        repeats=args.repeats,
        threads=args.threads,
        vision_only=args.vision_only,
    )
    place = (
        torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else f"{args.threads} CPU thread(s)"
    )
    kernels = operator_status.cpu_capability or "none"
    note = f"{place}, {args.dtype}, medians of {args.repeats}, kernels of the operator: {kernels}"
    if args.picture:
        chat_benchmark.draw_results(results, args.picture, note=note)
    return f"{note}\n{chat_benchmark.format_results(results)}", [result.to_dict() for result in results]


def add_backbone_command(commands: Any) -> None:
    parser = commands.add_parser(
        "backbone",
        help="forward passes of whole backbones against ViTDet",
        description="Forward passes of PIIP backbones with their feature pyramids, against Detectron2's ViTDet with "
        "its SimpleFeaturePyramid. The sides take turns in one process; on one CPU thread CPU time is taken.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_backbone_arguments(parser, forms=backbone_benchmark.FORMS, precisions=["fp32", "bf16"], repeats=5)
    parser.add_argument("--breakdown", action="store_true", help="show instead where the time goes")
    parser.set_defaults(run=run_backbone)


def add_train_command(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="training steps of whole backbones against ViTDet",
        description="Training steps (forward, backward, AdamW) of PIIP backbones with their feature pyramids, against "
        "Detectron2's ViTDet with its SimpleFeaturePyramid, and the memory of activations and gradients.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_backbone_arguments(parser, forms=["ours", "plain"], precisions=["fp32", "amp"], repeats=3)
    parser.set_defaults(run=run_train)


def _add_backbone_arguments(
    parser: argparse.ArgumentParser, forms: Sequence[str], precisions: list[str], repeats: int
) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        default=["piip_tsb_1568_1120_672", "piip_tsb_1120_896_448"],
        metavar="NAME",
        help="PIIP models, by the names of tools/analyze_model.py",
    )
    parser.add_argument("--forms", nargs="+", choices=list(forms), default=list(forms), help="of the PIIP models")
    parser.add_argument(
        "--neck",
        action="store_true",
        help="give PIIP the FPN of our detectors too, so that both sides end in maps of 256 channels",
    )
    parser.add_argument("--peer", choices=list(PEERS), default=PEERS[0], help="what the ratios are to")
    parser.add_argument("--precisions", nargs="+", choices=backbone_benchmark.PRECISIONS, default=precisions)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all image sizes, for a quick look")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 measures CPU time, more wall time")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=repeats, help="the median of so many is reported")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw the results into FILE (.png, .svg)")


def run_backbone(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    sides = _sides(args)
    if args.breakdown:
        from piip_tools.backbone_benchmark.detectron2_baselines import VITDET_PARTS

        names = {**backbone_benchmark.PARTS, **VITDET_PARTS}
        parts = backbone_benchmark.measure_parts(sides, args.precisions, parts=names, **_options(args))
        return backbone_benchmark.breakdown_table(parts), [part.to_dict() for part in parts]
    found = backbone_benchmark.measure_inference(sides, args.precisions, **_options(args))
    return _show(args, found, "Forward pass")


def run_train(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    found = backbone_benchmark.measure_training(_sides(args), args.precisions, **_options(args))
    return _show(args, found, "Training step")


def _sides(args: argparse.Namespace) -> list[backbone_benchmark.Side]:
    from piip_tools.backbone_benchmark.detectron2_baselines import (  # the other commands need no Detectron2
        piip_with_neck,
        vitdet_side,
    )

    options = {"wrap": piip_with_neck} if args.neck else {}
    sides = backbone_benchmark.piip_sides(args.models, args.forms, scale=args.scale, **options)
    return [*sides, vitdet_side(args.peer, args.scale)]


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("device", "batch", "repeats", "threads")}


def _show(
    args: argparse.Namespace, found: list[backbone_benchmark.Measurement], title: str
) -> tuple[str, list[dict[str, Any]]]:
    if args.picture:
        where = f"{args.device}, {args.threads} threads" if args.device == "cpu" else args.device
        figure = backbone_benchmark.draw_measurements(found, f"{title}, batch {args.batch}, {where}")
        _save(figure, args.picture)
    return backbone_benchmark.measurement_table(found), [measurement.to_dict() for measurement in found]


def _save(figure: Any, path: Path) -> None:
    with write_atomically(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_op_command(commands)
    add_backbone_command(commands)
    add_train_command(commands)
    add_chat_command(commands)
    for command in commands.choices.values():
        command.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    args = parser.parse_args()
    try:
        text, results = args.run(args)
    except UserError as error:
        parser.error(str(error))
    print(text)
    if args.json:
        with write_atomically(args.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
