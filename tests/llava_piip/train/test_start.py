"""What fresh processes print: what they were asked for, and nothing of libraries."""

import subprocess
import sys

import pytest


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("modules", ["llava_piip", "llava_piip.train.train, llava_piip.inference"])
def test_imports_are_silent(modules):
    done = run("-c", f"import {modules}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_help_of_the_training():
    done = run("-m", "llava_piip.train", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m llava_piip.train") and "chat_interactions_0/stage1" in done.stdout


def test_without_a_launcher_the_command_to_call_is_said(monkeypatch, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    done = run(
        *("-m", "llava_piip.train", "chat_interactions_0/stage1"),
        *("--annotations", "a.json", "--output_dir", str(tmp_path)),
    )
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1
    assert "Start it as `deepspeed llava_piip/train/train.py ...`" in done.stderr
