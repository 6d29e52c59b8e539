"""tools/benchmark.py op: both sides compute the same, and the report is complete."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from piip_core.ops import ms_deform_attn, ms_deform_attn_reference
from piip_core.ops.benchmark import CASES, _inputs

TOOL = Path(__file__).parents[3] / "tools" / "benchmark.py"


def test_cases_are_valid_and_the_sides_agree():
    for case in CASES:
        if case.queries > 2000:
            continue
        value, locations, weights = _inputs(case, torch.float32, "cpu", 1)
        flat = [size for shape in case.spatial_shapes for size in shape]
        ours = ms_deform_attn(value, case.spatial_shapes, locations, weights)
        torch.testing.assert_close(
            ours, ms_deform_attn_reference(value, flat, locations, weights), rtol=1e-4, atol=1e-4
        )


def test_command_prints_a_table_and_writes_json(tmp_path):
    file = tmp_path / "op.json"
    command = [sys.executable, str(TOOL), "op", "--cases", "L28<-B42", "--dtypes", "fp32", "bf16", "--repeats", "1"]
    result = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())
    assert [(row["dtype"], row["direction"]) for row in rows] == [
        ("fp32", "forward"),
        ("fp32", "backward"),
        ("bf16", "forward"),
        ("bf16", "backward"),
    ]
    for row in rows:
        assert row["ratio"] == row["pytorch_ms"] / row["ours_ms"]
        assert f"{row['ratio']:.1f}x" in result.stdout
