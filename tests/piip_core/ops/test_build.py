"""The build's promises: CUDA is decided by the environment alone, and a failed build still installs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def setup_script():
    spec = importlib.util.spec_from_file_location("piip_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("environment", "torch_cuda", "toolkit", "expected", "reason"),
    [
        ({}, "13.2", "/usr/local", False, "neither CUDA_HOME nor FORCE_CUDA=1 is set"),
        ({"CUDA_HOME": "/opt/cuda"}, "13.2", "/opt/cuda", True, "CUDA_HOME=/opt/cuda"),
        ({"FORCE_CUDA": "1"}, "13.2", "/usr/local", True, "FORCE_CUDA=1"),
        ({"FORCE_CUDA": "0", "CUDA_HOME": "/opt/cuda"}, "13.2", "/opt/cuda", False, "FORCE_CUDA=0"),
        ({"FORCE_CUDA": "1"}, None, "/usr/local", False, "is built without CUDA"),
        ({"FORCE_CUDA": "1"}, "13.2", None, False, "no CUDA toolkit"),
    ],
)
@pytest.mark.parametrize("gpu_visible", [False, True])
def test_cuda_is_decided_by_the_environment(
    setup_script, monkeypatch, environment, torch_cuda, toolkit, expected, reason, gpu_visible
):
    for name in ("CUDA_HOME", "FORCE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", toolkit)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu_visible)
    cuda, why = setup_script.decide_cuda()
    assert cuda is expected
    assert reason in why


def build(tmp_path, **environment):
    command = [sys.executable, "setup.py", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "tmp")]
    clean = {key: value for key, value in os.environ.items() if key not in ("CUDA_HOME", "FORCE_CUDA")}
    result = subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=300)
    record = tmp_path / "lib" / "piip_core" / "_build_info.json"
    return result, json.loads(record.read_text()) if record.exists() else None


def test_install_succeeds_without_a_compiler(tmp_path):
    result, record = build(tmp_path, CXX="no-such-compiler", CC="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert "WARNING: installing WITHOUT the compiled deformable-attention operator" in result.stderr
    assert record["built"] is False
    assert "build failed" in record["errors"][0]
    assert not list((tmp_path / "lib").rglob("*.so"))


def test_required_build_fails_without_a_compiler(tmp_path):
    result, _ = build(tmp_path, CXX="no-such-compiler", CC="no-such-compiler", PIIP_BUILD_EXTENSION="require")
    assert result.returncode != 0
    assert "PIIP_BUILD_EXTENSION=require" in result.stderr


def test_build_can_be_switched_off(tmp_path):
    result, record = build(tmp_path, PIIP_BUILD_EXTENSION="0")
    assert result.returncode == 0, result.stderr
    assert record == record | {"built": False, "cuda": False}
    assert record["errors"] == ["PIIP_BUILD_EXTENSION=0: not built, as asked"]


def test_missing_torch_names_the_remedy(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode != 0
    assert "no torch here" in result.stderr and "--no-build-isolation" in result.stderr
