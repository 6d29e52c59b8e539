import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "data" / "goldens"


@pytest.fixture(scope="session")
def tool(load_tool):
    return load_tool("verify_reference")


def test_the_last_line_counts_and_the_status_is_0(tool, capsys):
    assert tool.main([str(GOLDENS / "msdeform_fp32.json"), str(GOLDENS / "load_mae_no_ls.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "2 passed, 0 failed, 0 not supported yet"
    assert "msdeform_fp32" in lines[0] and "grad" in lines[0] and "e-0" in lines[0]


def test_a_failure_gives_status_1_and_names_the_tensor(tool, capsys, tmp_path):
    tensors = load_file(GOLDENS / "msdeform_fp32.safetensors")
    tensors["output.mask"] = tensors["output.mask"] + 1.0
    save_file(tensors, tmp_path / "msdeform_fp32.safetensors")
    (tmp_path / "msdeform_fp32.json").write_text((GOLDENS / "msdeform_fp32.json").read_text())
    assert tool.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "output.mask: error" in out
    assert out.splitlines()[-1] == "0 passed, 1 failed, 0 not supported yet"


def test_without_detectron2_its_cases_are_not_supported_yet(tool, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "detectron2" else find_spec(name))
    names = ("head_mask_rcnn_b", "pipe_det_1333", "msdeform_fp32")
    assert tool.main([str(GOLDENS / f"{name}.json") for name in names]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("needs detectron2" in line for line in lines[:2])
    assert lines[-1] == "1 passed, 0 failed, 2 not supported yet"


def test_unknown_families_are_not_supported_yet(tool, capsys, tmp_path):
    (tmp_path / "case.json").write_text('{"name": "case", "family": "telepathy"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "case.safetensors")
    assert tool.main([str(tmp_path)]) == 0
    assert "telepathy" in capsys.readouterr().out


def test_a_wrong_path_is_a_usage_error(tool, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        tool.main([str(tmp_path / "nothing")])
    assert stop.value.code == 2
    assert "nothing" in capsys.readouterr().err


def test_it_runs_as_a_script(run_python):
    run = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    script, case = ROOT / "tools" / "verify_reference.py", GOLDENS / "load_mae_no_ls.json"
    result = run_python(run, str(script), str(case))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "1 passed, 0 failed, 0 not supported yet"
