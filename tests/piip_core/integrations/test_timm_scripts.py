"""timm's scripts with the models of this project."""

import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext
from inspect import signature
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
    "TIMM_CHECKOUT" not in os.environ, reason="TIMM_CHECKOUT names no checkout or source package of timm"
)
PASSED = (
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs_non_std",
    "test_model_forward_features",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_prune_intermediate_layers_contract",
)
# The reasons are in docs/suites.md
REFUSED = {
    "test_model_inference": (RuntimeError, "No pretrained weights exist for piip_test"),
    "test_model_default_cfgs": (AttributeError, "'list' object has no attribute 'shape'"),
    "test_model_load_pretrained": (RuntimeError, "No pretrained weights exist for piip_test"),
    "test_model_features_pretrained": (RuntimeError, "No pretrained weights exist for piip_test"),
    "test_model_forward_torchscript": (ValueError, "Unknown type annotation: 'VisionTransformer'"),
    "test_model_forward_fx": (ValueError, "Proxy object cannot be iterated"),
    "test_model_backward_fx": (ValueError, "Proxy object cannot be iterated"),
    "test_model_forward_fx_torchscript": (ValueError, "Proxy object cannot be iterated"),
    "test_model_forward_torchscript_with_features_fx": (
        TypeError,
        "multiple values for keyword argument 'feature_cfg'",
    ),
}


@needs_checkout
@pytest.mark.parametrize("model", ["piip_test", "piip_tsb_368_192_128"])
def test_timms_own_tests(model, monkeypatch, pytestconfig):
    """Those of any model, which take a batch size, and the contract of pruned models."""
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)  # with it, timm leaves tests out
    for marker in "backward base cfg cfg_nonstd features forward fxbackward fxforward timeout torchscript".split():
        pytestconfig.addinivalue_line("markers", f"{marker}: of timm")
    spec = importlib.util.spec_from_file_location("timms", Path(os.environ["TIMM_CHECKOUT"], "tests/test_models.py"))
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    of_any = {name for name in dir(tests) if name.startswith("test_") and "batch_size" in _options(tests, name)}
    assert of_any | {"test_prune_intermediate_layers_contract"} == {*PASSED, *REFUSED}

    def run(name):
        options = {"model_name": model, "batch_size": 2, "cfg_device": "meta"}
        getattr(tests, name)(**{key: options[key] for key in _options(tests, name)})

    for name in PASSED:
        leaves_out = name == "test_model_default_cfgs_non_std" and model != "piip_test"
        with pytest.raises(pytest.skip.Exception, match="> limit") if leaves_out else nullcontext():
            run(name)
    for name, (error, message) in REFUSED.items() if model == "piip_test" else ():
        with pytest.raises(error, match=message):
            run(name)


def _options(tests, name):
    return signature(getattr(tests, name)).parameters


@needs_checkout
def test_timms_own_scripts_run_unchanged(tmp_path):
    """Training with EMA, mixup and layer decay, resuming it, and validating what it wrote."""
    from PIL import Image

    if not Path(os.environ["TIMM_CHECKOUT"], "train.py").is_file():
        pytest.skip("TIMM_CHECKOUT names a source package, which has no scripts")
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
