"""tools/benchmark.py op: all implementations compute the same, and the report is complete."""

import json
import sys
from types import ModuleType

import pytest
import torch

from piip_core.errors import UserError
from piip_core.ops import ms_deform_attn, ms_deform_attn_reference
from piip_tools.operator_benchmark.baselines import find_baselines, load_baseline, usual_formulation
from piip_tools.operator_benchmark.cases import CASES, Case, make_inputs
from piip_tools.operator_benchmark.measuring import implementations, measure_operator

SMALL = Case(name="small", query_shape=(5, 4), value_shapes=((6, 7),), width=6)
LEVELS = Case(name="levels", value_shapes=((6, 7), (3, 2)), width=5, heads=3)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.queries < 2000] + [SMALL, LEVELS], ids=lambda c: c.name
)
def test_implementations_agree(case):
    baselines = {name: load_baseline(name) for name in find_baselines("cpu")}
    inputs = make_inputs(case, torch.float32, "cpu", 2)
    ours, *others = (call(*inputs) for call in implementations(case, baselines, torch.float32, torch.float32).values())
    assert len(others) == 1 + len(baselines)
    for other in others:
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-3)


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


def test_missing_baseline_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmcv", None)
    with pytest.raises(UserError, match="--baselines mmcv: expected an importable module mmcv"):
        measure_operator([SMALL], ["fp32"], repeats=1, baselines=["mmcv"])


def test_the_original_extension_is_called_as_it_expects(monkeypatch):
    """A stand-in with the extension's two functions, since it exists for CUDA only."""
    value, *where = (x.requires_grad_() for x in make_inputs(LEVELS, torch.float32, "cpu", 3))

    def check(value, sizes, start, locations, weights):
        assert sizes.tolist() == [[6, 7], [3, 2]] and start.tolist() == [0, 42]
        assert value.dtype == locations.dtype == weights.dtype == torch.float32
        return value, LEVELS.flat_shapes, locations, weights

    def backward(*arguments):
        *inputs, grad, step = arguments
        assert step == 3
        return torch.ops.piip.ms_deform_attn_backward(grad, *check(*inputs))

    extension = ModuleType("MultiScaleDeformableAttention")
    extension.ms_deform_attn_forward = lambda *inputs: torch.ops.piip.ms_deform_attn(*check(*inputs[:-1]))
    extension.ms_deform_attn_backward = backward
    monkeypatch.setitem(sys.modules, "MultiScaleDeformableAttention", extension)
    theirs = load_baseline("deformable-detr")(value, LEVELS.value_shapes, *where)
    ours = ms_deform_attn(value, LEVELS.value_shapes, *where)
    for a, b in zip(
        (theirs, *torch.autograd.grad(theirs.sum(), (value, *where))),
        (ours, *torch.autograd.grad(ours.sum(), (value, *where))),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_command_prints_a_table_and_writes_json_and_a_chart(load_tool, monkeypatch, capsys, tmp_path):
    file, chart = tmp_path / "op.json", tmp_path / "op.png"
    command = ["benchmark.py", "op", "--cases", "L28<-B42", "--dtypes", "fp32", "bf16", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--baselines", "--json", str(file), "--chart", str(chart)])
    load_tool("benchmark").main()
    printed = capsys.readouterr().out
    rows = json.loads(file.read_text())
    assert [(row["dtype"], row["direction"]) for row in rows] == [
        ("fp32", "forward"),
        ("fp32", "backward"),
        ("bf16", "forward"),
        ("bf16", "backward"),
    ]
    for row in rows:
        assert row["form"] == "fused"
        assert row["ratio"] == row["pytorch_ms"] / row["ours_ms"]
        assert row["copy_share"] == pytest.approx(
            row["bytes_moved"] / (1e-3 * row["alone_ms"]) / row["copy_bytes_per_second"]
        )
        assert f"{row['ratio']:.1f}x" in printed
    assert chart.read_bytes().startswith(b"\x89PNG")
