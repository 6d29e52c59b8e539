"""tools/benchmark.py op: all implementations compute the same, and the report is complete."""

import json

import pytest
import torch

from piip_core.ops import ms_deform_attn_reference
from piip_tools.benchmarks.operators import (
    CASES,
    Case,
    implementations,
    make_inputs,
    operator_errors,
    transformers_layer,
    usual_formulation,
)

SMALL = Case(name="small", query_shape=(5, 4), value_shapes=((6, 7),), width=6)
LEVELS = Case(name="levels", value_shapes=((6, 7), (3, 2)), width=5, heads=3)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.queries < 2000] + [SMALL, LEVELS], ids=lambda c: c.name
)
def test_implementations_agree(case):
    inputs = make_inputs(case, torch.float32, "cpu", 2)
    ours, pytorch = (call(*inputs) for call in implementations(case, torch.float32).values())
    torch.testing.assert_close(ours, pytorch, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", [SMALL, LEVELS], ids=lambda c: c.name)
def test_transformers_layer_agrees(case):
    pytest.importorskip("transformers")
    calls = implementations(case, torch.float32, transformers_layer("cpu"))
    inputs = make_inputs(case, torch.float32, "cpu", 2)
    torch.testing.assert_close(calls["transformers"](*inputs), calls["pytorch"](*inputs))


@pytest.mark.parametrize("case", [SMALL, LEVELS], ids=lambda c: c.name)
def test_errors_of_the_operator(case):
    """Within float32's rounding, gradients too; those of values in bfloat16 are rounded to it."""
    errors, repeatable = operator_errors(case, torch.float32, "cpu")
    assert max(errors.values()) < 1e-5 and repeatable
    errors, _ = operator_errors(case, torch.bfloat16, "cpu")
    assert 1e-4 < errors["output"] < 2e-2 and 1e-4 < errors["value"] < 2e-2


def test_usual_formulation_is_the_reference():
    value, *where = make_inputs(LEVELS, torch.float64, "cpu", 2)
    expected = ms_deform_attn_reference(value, LEVELS.flat_shapes, *where)
    torch.testing.assert_close(usual_formulation(value, LEVELS.value_shapes, *where), expected)


def test_bytes_moved():
    """T98 <- S70 in fp32: (S + Q) M D and 3 Q M P numbers; backward the maps thrice and the samples twice."""
    case = CASES[0]
    maps, output, samples = 4 * 4900 * 96, 4 * 9604 * 96, 4 * 3 * 9604 * 64
    assert case.bytes_moved("forward", 1, 4, 4) == maps + output + samples
    assert case.bytes_moved("backward", 2, 4, 4) == 2 * (3 * maps + output + 2 * samples)
    assert case.bytes_moved("forward", 1, 2, 4) == (maps + output) // 2 + samples


def test_command_prints_a_table_and_writes_json_and_a_chart(load_tool, monkeypatch, capsys, tmp_path):
    file, chart = tmp_path / "op.json", tmp_path / "op.png"
    command = ["benchmark.py", "op", "--cases", "L28<-B42", "--dtypes", "fp32", "bf16", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--json", str(file), "--chart", str(chart)])
    load_tool("benchmark").main()
    printed = capsys.readouterr().out
    rows = json.loads(file.read_text())
    assert [row["what"] for row in rows] == [
        f"L28<-B42 (D = 32), {dtype}, {direction}"
        for dtype in ("fp32", "bf16")
        for direction in ("forward", "backward")
    ]
    for row in rows:
        medians = row["medians"]
        assert set(medians) - {"pytorch in fp32"} == {"ours", "pytorch", "copy"}
        assert ("pytorch in fp32" in medians) == ("bf16" in row["what"])
        assert row["ratios"]["ours"] == medians["ours"] / medians["pytorch"]
        assert f"{medians['ours']:.4g} ({row['ratios']['ours']:.3g})" in printed
    assert chart.read_bytes().startswith(b"\x89PNG")
