"""What fresh processes print: what they were asked for, and nothing of libraries."""

import subprocess
import sys

from safetensors.torch import load_file


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)


def test_imports_are_silent():
    done = run("-c", "import llava_piip, llava_piip.inference")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_help_of_the_training():
    done = run("-m", "llava_piip.train", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m llava_piip.train") and "chat_interactions_0/stage1" in done.stdout


def test_one_process_trains_without_a_launcher(files, tmp_path):
    """Projector and interactions, as in a setting of Table XIII."""
    parts = ("--train_parts", "projector", "interactions", "--max_steps", "2")
    done = run("-m", "llava_piip.train", *files.command(tmp_path / "run", *parts))
    assert done.returncode == 0, done.stderr
    saved = {path.stem for path in (tmp_path / "run" / "final").glob("*.safetensors")}
    assert saved == {"projector", "interactions"}
    before = load_file(files.model / "model.safetensors")
    after = load_file(tmp_path / "run" / "final" / "interactions.safetensors")
    assert not any(tensor.equal(before[name]) for name, tensor in after.items())
