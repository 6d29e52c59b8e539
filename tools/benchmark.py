#!/usr/bin/env python3
"""Measures the speed of PIIP's parts.

Examples:
    python tools/benchmark.py op
    python tools/benchmark.py op --dtypes fp32 bf16 --cases 'T98<-S70' --json op.json
    python tools/benchmark.py op --device cuda --batch 2
"""

import argparse
import json
from pathlib import Path
from typing import Any

from piip_core.files import write_atomically
from piip_core.ops import benchmark as op_benchmark
from piip_core.ops import operator_status


def add_op_command(commands: Any) -> None:
    parser = commands.add_parser(
        "op",
        help="deformable attention against the same in PyTorch",
        description="Forward and backward of the deformable-attention operator against the same in PyTorch.",
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
        "--baseline-in-float32",
        action="store_true",
        help="run the PyTorch side of 16-bit cases in float32, which is faster on CPUs than in the dtype itself",
    )
    parser.set_defaults(run=run_op)


def run_op(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    timings = op_benchmark.run_benchmark(
        [case for case in op_benchmark.CASES if case.name in args.cases],
        args.dtypes,
        device=args.device,
        batch=args.batch,
        repeats=args.repeats,
        threads=args.threads,
        baseline_in_float32=args.baseline_in_float32,
    )
    header = f"operator: {operator_status.reason} (CPU kernels: {operator_status.cpu_capability})"
    return f"{header}\n{op_benchmark.format_table(timings)}", [timing.to_dict() for timing in timings]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_op_command(commands)
    for command in commands.choices.values():
        command.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    args = parser.parse_args()
    text, results = args.run(args)
    print(text)
    if args.json:
        with write_atomically(args.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
