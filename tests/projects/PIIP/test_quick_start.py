"""The README's transcript of a detector of your own, command by command."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from piip import cli

ROOT = Path(__file__).parents[3]


def _transcript() -> list[tuple[list[str], list[str]]]:
    """Commands, and the lines that each prints."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```console\n(\$ python datasets/prepare.*?)```", readme, re.DOTALL)
    commands: list[tuple[list[str], list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            commands.append((shlex.split(line[2:]), []))
        elif line != "...":
            commands[-1][1].append(line)
    return commands


def _without_numbers(line: str) -> str:
    return re.sub(r"[\d.]+(e-\d+)?", "#", line)


def test_the_commands_exist(monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda args: None)
    for (program, *arguments), _ in _transcript():
        if program == "piip":
            cli.main(arguments)
        else:
            assert (ROOT / arguments[0]).is_file()


@pytest.mark.slow
def test_the_transcript_ends_with_a_file_that_finds_digits(tmp_path):
    for folder in ("datasets", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("digits", "boxes"))
    path = os.pathsep.join(map(str, (ROOT, ROOT / "projects/PIIP", ROOT / "datasets")))
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    for (program, *arguments), expected in _transcript():
        command = [sys.executable, *(["-m", "piip"] if program == "piip" else []), *arguments]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        printed = {_without_numbers(line) for line in ran.stdout.splitlines()}
        assert {_without_numbers(line) for line in expected} <= printed
    found = re.findall(r": (\d) ([\d.]+) at \[", ran.stdout)
    labels = (tmp_path / "datasets/boxes/labels/val/000001.txt").read_text().splitlines()
    assert {name for name, _ in found} & {line.split()[0] for line in labels}
