"""python -m piip_core.doctor: what a bug report needs, and what the extras lack."""

import importlib.metadata

import torch

from piip_core import doctor
from piip_core.ops import operator_status


def test_report_tells_the_state_of_this_environment():
    report = doctor.collect()
    assert report["packages"]["torch"] == importlib.metadata.version("torch")
    assert report["operator"]["compiled"] == operator_status.compiled
    assert report["operator"]["reason"] == operator_status.reason
    assert report["operator"]["self_test"]["cpu"].startswith("ok")
    assert report["torch"]["cuda_available"] == torch.cuda.is_available()
    text = doctor.format_report(report)
    assert ("cuda_kernels: Triton" in text) == ("cuda" in operator_status.triton)
    for needed in (torch.__version__.split("+")[0], "nvcc", "CUDA_HOME", "self_test", "detectron2"):
        assert needed in text


def test_extras_say_what_they_lack(monkeypatch):
    asked = [
        "torch>=2.10",
        'detectron2 @ git+https://example.org/detectron2 ; extra == "detection"',
        'piip[tools]; extra == "detection"',
        'setuptools<81; extra == "tools"',
        'piip[tools]; extra == "llava-qlora"',
        'transformers>=5.23; extra == "transformers"',
    ]
    versions = {"setuptools": "82.0.1", "transformers": "5.24.0"}
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    report = doctor.collect()
    needed = "setuptools<81 (82.0.1): pip install --no-build-isolation -e "
    assert report["extras"] == {
        "detection": f"needs detectron2 (not installed), {needed}'.[detection]'",
        "llava-qlora": f"needs {needed}'.[llava-qlora]'",
        "tools": f"needs {needed}'.[tools]'",
        "transformers": "ready",
    }
    assert report["packages"]["transformers"] == "5.24.0" and report["packages"]["detectron2"] == "not installed"


def test_wrong_operator_is_recognised(monkeypatch):
    monkeypatch.setattr(doctor, "ms_deform_attn", lambda value, *rest: torch.zeros(2, 7, 18))
    assert doctor._self_test("cpu").startswith("WRONG")


def test_report_where_this_project_is_not_installed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    report = doctor.collect()
    assert report["extras"] == {} and report["packages"]["timm"] == importlib.metadata.version("timm")
