"""tools/gpu_check.py: its report, time limits and failing steps; all of it on a CPU, in an environment of its own."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "timm", "numpy", "safetensors")
FINDS = """echo '"A note."' >> "$0"; echo '{"what": "a|b", "ms": 1.23456, "n": null}' >> "$0"; """


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("gpu_check")


def test_failing_and_hanging_steps_stop_no_other(tool, tmp_path):
    scripts = {
        "fine": FINDS + "echo not shown",
        "fails": FINDS + "echo why >&2; exit 3",
        "hangs": FINDS + "sleep 60 & echo $! > child; cp report.md so_far.md; wait",
        "needs": "echo needs a package; exit 77",
        "last": FINDS,
    }
    commands = {name: ["sh", "-c", f'cd "$(dirname "$0")"; {script}'] for name, script in scripts.items()}
    start = time.monotonic()
    steps = tool.run_steps(commands, dict.fromkeys(scripts, 1.0), tmp_path)
    assert time.monotonic() - start < len(scripts) + 1
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "cmdline")
    assert not child.exists() or child.read_text() == ""  # ended, if nobody has taken notice yet
    results = {step["name"]: step["result"].split(" (")[0].split(" than")[0] for step in steps}
    assert results == dict(fine="passed", fails="failed", hangs="took more", needs="left out", last="passed")
    assert json.loads((tmp_path / "report.json").read_text()) == steps
    for step in steps:  # also what was found before a step failed
        assert step["found"] == (
            [] if step["name"] == "needs" else ["A note.", {"what": "a|b", "ms": 1.23456, "n": None}]
        )
    report = (tmp_path / "report.md").read_text()
    assert report.count("| what | ms | n |\n|---|---|---|\n| a/b | 1.235 |  |") == 4
    assert "## fails: failed (exit status 3)" in report and "```\nwhy\n```" in report and "not shown" not in report
    assert (tmp_path / "so_far.md").read_text().splitlines()[-1].startswith("```")  # of the first two steps


def environment_of(packages, folder: Path) -> Path:
    """The interpreter of an environment that holds these packages with what they require, as links to those here."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    target = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    todo, done = list(packages), set()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        found = importlib.metadata.distribution(name)
        wanted = map(Requirement, found.requires or [])
        todo += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (target / top).exists():
                (target / top).symlink_to(found.locate_file(top))
    return folder / "bin" / "python"


@pytest.mark.slow
def test_rehearsal_with_nothing_but_what_it_asks_for(tmp_path):
    """From a checkout where nothing is compiled."""
    python = environment_of(PACKAGES, tmp_path / "environment")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "piip_core", "projects", "llava_piip", "tools", "datasets", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "_build_info.json"))
    for package in ("transformers", "detectron2", "pytest", "tabulate", "scipy", "piip_core"):
        assert subprocess.run([python, "-c", f"import {package}"], cwd="/", capture_output=True).returncode == 1
    command = [python, "tools/gpu_check.py", "--device", "cpu", "--small", "--minutes", "60", "--output", "found"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    report = (tmp_path / "found" / "report.md").read_text()
    assert done.returncode == 0, report + done.stderr
    steps = json.loads((tmp_path / "found" / "report.json").read_text())
    left_out = {step["name"] for step in steps if step["result"] == "left out"}
    assert left_out - {"sanitizer"} == {"operator_tests", "chat"}
    assert "Left out: head_mask_rcnn_b, needs detectron2" in report
    assert {"passed", "left out"} == {step["result"] for step in steps}
