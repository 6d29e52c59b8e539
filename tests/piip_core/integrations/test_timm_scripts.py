"""timm's scripts with the models of this project."""

import importlib.util
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


needs_checkout = pytest.mark.skipif(
    "TIMM_CHECKOUT" not in os.environ, reason="TIMM_CHECKOUT names no checkout of timm's repository"
)
REFUSED = {
    "test_model_forward_torchscript": "torch.jit.script knows no named tuples of features: torch.jit.trace instead",
    "test_model_forward_fx": "sizes decide what is computed, which torch.fx does not see: torch.export instead",
    "test_model_forward_intermediates": "features are a list, one for each branch, not a tensor",
    "test_model_default_cfgs": "features are a list, one for each branch, with no single pool size",
}


@needs_checkout
@pytest.mark.parametrize("name", ["piip_test", "piip_tsb_368_192_128"])
def test_timms_own_tests(name):
    """tests/test_models.py; what a model of several branches cannot do is in `REFUSED`."""
    path = Path(os.environ["TIMM_CHECKOUT"], "tests", "test_models.py")
    spec = importlib.util.spec_from_file_location("timm_test_models", path)
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    for test in (
        tests.test_model_forward,
        tests.test_model_backward,
        tests.test_model_forward_features,
        tests.test_model_forward_intermediates_features,
        *([tests.test_model_default_cfgs_non_std] if name == "piip_test" else []),  # it leaves images beyond 320 out
    ):
        test(model_name=name, batch_size=2)
    for refused in REFUSED if name == "piip_test" else ():
        with pytest.raises(Exception):  # noqa: B017  (of whatever library gives up)
            getattr(tests, refused)(model_name=name, batch_size=1)


@needs_checkout
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
