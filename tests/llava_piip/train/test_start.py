"""What fresh processes print: what they were asked for, and nothing of libraries."""

import subprocess
import sys

from safetensors.torch import load_file

_HELP = """
import runpy, sys
import llava_piip, llava_piip.inference
sys.argv[1:] = ["--help"]
runpy.run_module("llava_piip.train", run_name="__main__", alter_sys=True)
"""
_TRAIN = """
import runpy
runpy.run_module("llava_piip.train", run_name="__main__", alter_sys=True)
"""


def test_imports_and_the_help_of_the_training_say_nothing_else():
    done = subprocess.run([sys.executable, "-c", _HELP], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m llava_piip.train") and "chat_interactions_0/stage1" in done.stdout


def test_one_process_trains_without_a_launcher(files, run_python, tmp_path):
    """Projector and interactions, as in a setting of Table XIII."""
    parts = ("--train_parts", "projector", "interactions", "--max_steps", "2")
    done = run_python(_TRAIN, *files.command(tmp_path / "run", *parts))
    assert done.returncode == 0, done.stderr
    saved = {path.stem for path in (tmp_path / "run" / "final").glob("*.safetensors")}
    assert saved == {"projector", "interactions"}
    before = load_file(files.model / "model.safetensors")
    after = load_file(tmp_path / "run" / "final" / "interactions.safetensors")
    assert not any(tensor.equal(before[name]) for name, tensor in after.items())
