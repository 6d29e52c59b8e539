"""python -m piip_core.doctor: what a bug report needs, as text and as JSON."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
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
    for needed in (torch.__version__.split("+")[0], "nvcc", "CUDA_HOME", "self_test", "detectron2"):
        assert needed in text


def test_missing_detectron2_comes_with_the_way_to_get_it(monkeypatch):
    known = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "detectron2" else known(name))
    report = doctor.collect()
    assert report["detectron2"]["found"] is False
    assert "--no-build-isolation -e '.[detection]'" in doctor.format_report(report)


def test_too_new_setuptools_is_pointed_out(monkeypatch):
    versions = {"detectron2": "0.6", "setuptools": "82.0.1"}
    monkeypatch.setattr(doctor, "installed_version", lambda name: versions.get(name))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: importlib.metadata.PathDistribution.at("."))
    assert "setuptools below 81, found 82.0.1" in doctor._detectron2_facts()["hint"]


@pytest.fixture
def versions(monkeypatch):
    """Versions that the doctor finds, for a test to change; the project asks for some transformers and deepspeed."""
    found = {name: "99.0" for packages in doctor.LLAVA_NEEDS.values() for name in packages}
    asked = ["torch>=2.10", 'transformers>=5.23; extra == "llava"', 'deepspeed>=0.19.8; extra == "llava"']
    monkeypatch.setattr(doctor, "installed_version", lambda name: found.get(name))
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    return found


def test_llava_is_ready_with_its_packages(versions):
    assert set(doctor._llava_facts().values()) == {"ready"}


def test_missing_llava_packages_come_with_what_does_not_work(versions):
    del versions["deepspeed"]
    del versions["bitsandbytes"]
    facts = doctor._llava_facts()
    assert facts["deepspeed launcher, ZeRO"] == "needs deepspeed>=0.19.8 (not installed)"
    assert facts["QLoRA"] == "needs bitsandbytes (not installed)"
    assert facts["chat model"] == facts["training, LoRA"] == "ready"
    assert "'.[llava]'" in facts["hint"]
    versions["transformers"] = "5.9.1"
    assert doctor._llava_facts()["training, LoRA"] == "needs transformers>=5.23 (5.9.1)"


def test_llava_packages_are_those_of_the_extras():
    """The doctor's lists, against what the project declares."""
    asked = doctor._wanted_versions()
    for packages in doctor.LLAVA_NEEDS.values():
        for name in packages:
            assert name in doctor.PACKAGES
            assert asked[name].specifier, name
    assert {name for name, need in doctor.PACKAGES.items() if "llava" in need} <= set(asked)


def test_wrong_operator_is_recognised(monkeypatch):
    monkeypatch.setattr(doctor, "ms_deform_attn", lambda value, *rest: torch.zeros(2, 7, 18))
    assert doctor._self_test("cpu").startswith("WRONG")


def test_command_prints_json():
    result = subprocess.run(
        [sys.executable, "-m", "piip_core.doctor", "--json"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report) == {
        "system",
        "packages",
        "untested",
        "torch",
        "build_tools",
        "environment",
        "operator",
        "detectron2",
        "llava",
    }
