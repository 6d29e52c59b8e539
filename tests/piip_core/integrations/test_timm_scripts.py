"""timm's scripts with the models of this project."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from piip_core.integrations.timm import __main__ as runner


def test_scripts_run_with_the_models_registered(monkeypatch, tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("import sys, timm\nprint(__name__, sys.argv[1:], timm.is_model('piip_tsb_368_192_128'))\n")
    monkeypatch.setattr(sys, "argv", ["timm", str(script), "--model", "piip_test"])
    runner.main()
    assert capsys.readouterr().out == "__main__ ['--model', 'piip_test'] True\n"
    monkeypatch.setattr(sys, "argv", ["timm", str(tmp_path / "train.py")])
    with pytest.raises(SystemExit, match="no such file; expected a script"):
        runner.main()


@pytest.mark.skipif("TIMM_CHECKOUT" not in os.environ, reason="TIMM_CHECKOUT names no checkout of timm's repository")
def test_timms_own_scripts_run_unchanged(tmp_path):
    """Training with EMA, mixup and layer decay, resuming it, and validating what it wrote."""
    from PIL import Image

    for split in ("train", "validation"):
        for label, colour in enumerate(("red", "blue")):
            folder = tmp_path / split / colour
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (96, 96), (200 * (1 - label), 10 * i, 200 * label)).save(folder / f"{i}.png")
    data = ["--data-dir", str(tmp_path), "--model", "piip_tsb_368_192_128", "--num-classes", "2", "-b", "4"]
    data += ["--input-size", "3", "96", "96", "--device", "cpu", "--no-prefetcher", "-j", "0"]
    train = ["train.py", *data, "--output", str(tmp_path), "--experiment", "run", "--opt", "adamw", "--lr", "1e-3"]
    train += ["--model-ema", "--mixup", "0.8", "--cutmix", "1.0", "--layer-decay", "0.75", "--warmup-epochs", "0"]

    def run(script: str, *arguments: str) -> str:
        path = Path(os.environ["TIMM_CHECKOUT"], script)
        command = [sys.executable, "-m", "piip_core.integrations.timm", str(path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    run(*train, "--epochs", "1")
    run(*train[:-1], "0", "--epochs", "2", "--resume", str(tmp_path / "run" / "last.pth.tar"))
    assert '"top1"' in run("validate.py", *data, "--checkpoint", str(tmp_path / "run" / "last.pth.tar"))
