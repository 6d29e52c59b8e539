#!/usr/bin/env python3
"""Builds, tests and measures everything on a GPU, in under eight minutes.

Examples:
    python tools/gpu_check.py
    python tools/gpu_check.py --only build operator operator_speed
    python tools/gpu_check.py --device cpu --small

Needs PyTorch, timm, numpy, safetensors and a compiler (for a GPU nvcc); nothing has to be installed from this
repository. What needs more is left out, by name. Each step is a process of its own; report.md and report.json are
written anew after each, and a step that fails or takes too long stops no other. What a step leaves of its time the next
ones may use. The exit status is 1 if a step failed or took too long.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {  # of each step in order, less than eight minutes together
    "machine": 15,
    "build": 75,
    "operator": 30,
    "operator_tests": 40,
    "sanitizer": 40,
    "goldens": 40,
    "operator_speed": 50,
    "triton": 40,
    "backbones": 45,
    "memory": 30,
    "chat": 35,
    "compiled": 35,
}
LEFT_OUT = 77  # exit status of a step that needs what is not installed
_SHOWN = 15  # last lines of what a step printed that failed


def run_steps(commands: Mapping[str, list[str]], seconds: Mapping[str, float], folder: Path) -> list[dict[str, Any]]:
    """Runs a process per step, and writes the report of `folder` after each.

    Args:
        commands: By step; the process appends its findings to the file that the last argument names, as lines of JSON.
        seconds: Of each step, beside what the steps before it have left.
        folder: Gets the findings, what the steps print, and the report.
    """
    steps, end = [], time.monotonic()
    for name, command in commands.items():
        start = time.monotonic()
        end = max(start, end) + seconds[name]
        print(f"{name}: ", end="", flush=True)
        found, log = folder / f"{name}.jsonl", folder / f"{name}.log"
        found.write_text("")
        with log.open("w") as output:
            result = _run([*command, str(found)], output, end - start)
        step = {"name": name, "result": result, "seconds": round(time.monotonic() - start, 1)}
        step["found"] = [json.loads(line) for line in found.read_text().splitlines()]
        step["printed"] = log.read_text(errors="replace").splitlines()[-_SHOWN:]
        print(f"{result}, {step['seconds']} s", flush=True)
        steps.append(step)
        _write(folder / "report.json", json.dumps(steps, indent=1))
        _write(folder / "report.md", format_report(steps))
    return steps


def _run(command: list[str], output: Any, seconds: float) -> str:
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"took more than {seconds:.0f} s"
    finally:  # also what it has started itself, such as compilers
        _end_group(process)
    return {0: "passed", LEFT_OUT: "left out"}.get(status, f"failed (exit status {status})")


def _end_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _write(path: Path, text: str) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    os.replace(aside, path)


def format_report(steps: Iterable[Mapping[str, Any]]) -> str:
    """The steps as Markdown: a table of their results, then what each found, and what it printed if it did not pass."""
    summary = [{"step": step["name"], "result": step["result"], "seconds": step["seconds"]} for step in steps]
    lines = ["# GPU check", *_format_found(summary)]
    for step in steps:
        lines += ["", f"## {step['name']}: {step['result']}", *_format_found(step["found"])]
        if step["result"] != "passed":
            lines += ["", "```", *step["printed"], "```"]
    return "\n".join(lines) + "\n"


def _format_found(found: Iterable[str | Mapping[str, Any]]) -> list[str]:
    lines, header = [], None
    for item in found:
        if isinstance(item, str):
            lines, header = [*lines, "", item], None
            continue
        if list(item) != header:
            header = list(item)
            lines += ["", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        lines.append(f"| {' | '.join(map(_format_cell, item.values()))} |")
    return lines


def _format_cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to rehearse the steps")
    parser.add_argument("--only", nargs="+", choices=SECONDS, default=list(SECONDS), metavar="STEP")
    parser.add_argument("--minutes", type=float, default=8, help="at most, for all steps together")
    parser.add_argument("--output", type=Path, default=Path("output/gpu_check"), metavar="FOLDER")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    folders = [ROOT, ROOT / "projects" / "PIIP", ROOT / "tools", ROOT / "tests" / "goldens"]
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    options = ["--device", args.device, *["--small"] * args.small]
    commands = {name: [sys.executable, "-m", "piip_tools.gpu_steps", name, *options] for name in args.only}
    seconds = {name: own * args.minutes / 8 for name, own in SECONDS.items()}
    steps = run_steps(commands, seconds, args.output.resolve())
    print(f"Report: {args.output / 'report.md'}")
    sys.exit(any(step["result"] not in ("passed", "left out") for step in steps))


if __name__ == "__main__":
    main()
