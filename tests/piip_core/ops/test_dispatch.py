"""How the operator lives with the rest of PyTorch: registration, compile, export, autocast, and the fallback."""

import json

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from piip_core.ops import (
    MSDeformAttn,
    deform_attn_grid,
    make_reference_points,
    ms_deform_attn,
    operator_status,
)

OPERATORS = ("ms_deform_attn", "ms_deform_attn_backward", "deform_attn_grid", "deform_attn_grid_backward")


class Reader(torch.nn.Module):
    """Every query of a fixed 5 x 6 map reads an image-like value map."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = MSDeformAttn(32, 4, value_ratio=0.5, value_dim=8)
        torch.nn.init.normal_(self.attention.sampling_offsets.weight, std=0.1)
        torch.nn.init.normal_(self.attention.attention_weights.weight, std=0.1)

    def forward(self, query, image):
        points = make_reference_points(5, 6, device=query.device)
        return self.attention(query, points, image.flatten(2).transpose(1, 2), [tuple(image.shape[2:])])


@pytest.fixture
def reader():
    return Reader()


def reader_inputs(height=7, width=9, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 30, 32, generator=generator), torch.randn(batch, 8, height, width, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(make_inputs, dtype):
    inputs = make_inputs(spatial_shapes=((5, 7), (3, 2)), dtype=dtype)
    arguments = (inputs.flat_shapes, inputs.locations, inputs.weights)
    opcheck(torch.ops.piip.ms_deform_attn_backward, (inputs.grad_output, inputs.value, *arguments))
    inputs.require_grad()
    opcheck(torch.ops.piip.ms_deform_attn, (inputs.value, *arguments))


def test_compile_forward_and_backward(make_inputs):
    inputs = make_inputs(dtype=torch.float32).require_grad()

    def call(value, locations, weights):
        return ms_deform_attn(value, inputs.spatial_shapes, locations, weights)

    compiled = torch.compile(call, fullgraph=True)
    expected, actual = call(*inputs.leaves), compiled(*inputs.leaves)
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, inputs.leaves, inputs.grad_output),
        torch.autograd.grad(expected, inputs.leaves, inputs.grad_output),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_compile_with_dynamic_shapes(reader):
    compiled = torch.compile(reader, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ((7, 9, 2), (4, 11, 3)):
        query, image = reader_inputs(*sizes)
        torch.testing.assert_close(compiled(query, image), reader(query, image))


def test_export(reader):
    query, image = reader_inputs()
    exported = torch.export.export(reader, (query, image))
    operators = {str(node.target) for node in exported.graph.nodes}
    assert "piip.ms_deform_attn.default" in operators
    torch.testing.assert_close(exported.module()(query, image), reader(query, image))


def test_export_with_dynamic_shapes(reader):
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "height", "width"))
    shapes = {"query": {0: batch}, "image": {0: batch, 2: height, 3: width}}
    exported = torch.export.export(reader, reader_inputs(), dynamic_shapes=shapes)
    query, image = reader_inputs(12, 5, 3)
    torch.testing.assert_close(exported.module()(query, image), reader(query, image))


def test_meta_device(reader):
    with torch.device("meta"):
        output = Reader()(torch.empty(2, 30, 32), torch.empty(2, 8, 7, 9))
    assert output.device.type == "meta" and output.shape == (2, 30, 32)


class RecordArguments(TorchDispatchMode):
    """Notes the dtypes of the tensors each operator of ours is called with."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.piip.ms_deform_attn.default:
            self.dtypes.append([x.dtype for x in args if isinstance(x, torch.Tensor)])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_locations_in_float32(reader, dtype):
    query, image = reader_inputs()
    with torch.autocast("cpu", dtype), RecordArguments() as record:
        output = reader(query, image)
    assert record.dtypes == [[dtype, torch.float32, torch.float32]]
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), reader(query, image), rtol=0.02, atol=0.02)
    output.float().square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in reader.parameters())


def test_half_precision_module_keeps_locations_in_float32(reader):
    query, image = reader_inputs()
    expected = reader(query, image)
    with RecordArguments() as record:
        output = reader.bfloat16()(query.bfloat16(), image.bfloat16())
    assert record.dtypes == [[torch.bfloat16, torch.float32, torch.float32]]
    torch.testing.assert_close(output.float(), expected, rtol=0.03, atol=0.03)


class _BackwardCalls(TorchDispatchMode):
    """Notes how the operators' backward functions are called."""

    def __init__(self):
        super().__init__()
        self.deterministic = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.piip.ms_deform_attn_backward.default, torch.ops.piip.deform_attn_grid_backward.default):
            names = [argument.name for argument in func._schema.arguments]
            self.deterministic.append(dict(zip(names, args, strict=False)).get("deterministic", False))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", [False, True])
def test_backward_is_deterministic_where_that_is_asked_for(make_inputs, wanted):
    """The CUDA kernels then add up in fixed point (cuda/test_cuda_kernels.py); on the CPU it is always so."""
    inputs = make_inputs(dtype=torch.float32).require_grad()
    sampling = torch.cat((inputs.locations.flatten(2), inputs.weights.flatten(2)), dim=2)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(wanted)
        with _BackwardCalls() as calls:
            ms_deform_attn(*inputs.arguments).sum().backward()
            deform_attn_grid(inputs.value, inputs.spatial_shapes, (1, 13), sampling).sum().backward()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    assert calls.deterministic == [wanted, wanted]


SCRIPT = """
import json, sys, warnings
import torch
from torch.library import opcheck
warnings.simplefilter("ignore", FutureWarning)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", RuntimeWarning)
    from piip_core.ops import deform_attn_grid, ms_deform_attn, operator_status
    inputs = torch.load(sys.argv[1], weights_only=True)
    results = []
    for value, shapes, locations, weights, grad, sampling in inputs:
        leaves = [t.requires_grad_() for t in (value, locations, weights, sampling)]
        output = ms_deform_attn(value, shapes, locations, weights)
        fused = deform_attn_grid(value, shapes, (1, sampling.shape[1]), sampling)
        results.append([output.detach(), *torch.autograd.grad(output, leaves[:3], grad)])
        results[-1] += [fused.detach(), *torch.autograd.grad(fused, [value, sampling], grad)]
    flat = [size for pair in shapes for size in pair]
    reference = not operator_status.compiled  # how kernels are registered is the same for all
    checks = opcheck(torch.ops.piip.ms_deform_attn, (value, flat, locations, weights)) if reference else {}
torch.save(results, sys.argv[2])
print(json.dumps({
    "compiled": operator_status.compiled,
    "reason": operator_status.reason,
    "capability": operator_status.cpu_capability,
    "schemas": [str(getattr(torch.ops.piip, name).default._schema) for name in sys.argv[3:]],
    "checks": checks,
    "warnings": [str(w.message) for w in caught if w.category is RuntimeWarning],
}))
"""


@pytest.mark.parametrize(
    "environment",
    [{"PIIP_DISABLE_EXTENSION": "1"}, {"PIIP_CPU_CAPABILITY": "portable"}, {"PIIP_CPU_CAPABILITY": "avx2"}],
    ids=["reference", "portable", "avx2"],
)
def test_other_implementations_give_the_same(make_inputs, tmp_path, run_python, environment):
    """The PyTorch fallback and the kernels for lesser processors: same schema, same numbers, opcheck passes."""
    cases = [
        make_inputs(width=width, spatial_shapes=((5, 7), (3, 2)), dtype=dtype)
        for width in (6, 24, 33)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    ]
    samplings = [case.sampling() for case in cases]
    torch.save(
        [
            (c.value, list(c.spatial_shapes), c.locations, c.weights, c.grad_output, sampling)
            for c, sampling in zip(cases, samplings, strict=True)
        ],
        tmp_path / "in",
    )
    result = run_python(SCRIPT, str(tmp_path / "in"), str(tmp_path / "out"), *OPERATORS, **environment)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])

    if "PIIP_DISABLE_EXTENSION" in environment:
        assert not report["compiled"] and "PIIP_DISABLE_EXTENSION" in report["reason"]
        assert report["warnings"] == []  # asked for, so nothing to warn of
        assert set(report["checks"].values()) == {"SUCCESS"}
    elif operator_status.compiled and operator_status.cpu_capability != "portable":
        assert report["capability"] == environment["PIIP_CPU_CAPABILITY"]
    assert report["schemas"] == [str(getattr(torch.ops.piip, name).default._schema) for name in OPERATORS]

    tolerance = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-12}
    outcome = torch.load(tmp_path / "out", weights_only=True)
    for case, sampling, theirs in zip(cases, samplings, outcome, strict=True):
        case.require_grad()
        sampling.requires_grad_()
        output = ms_deform_attn(*case.arguments)
        fused = deform_attn_grid(case.value, case.spatial_shapes, (1, sampling.shape[1]), sampling)
        ours = output, *torch.autograd.grad(output, case.leaves, case.grad_output)
        ours += fused, *torch.autograd.grad(fused, (case.value, sampling), case.grad_output)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.dtype == other.dtype
            error = (mine.double() - other.double()).abs().max() / mine.double().abs().max()
            assert error < tolerance[mine.dtype]


def test_missing_library_is_told_once(run_python):
    """Without the library, and not on purpose, the first call warns with reason and remedy, the second is silent."""
    script = (
        "import os, warnings, torch\n"
        "os.environ.pop('PIIP_DISABLE_EXTENSION', None)\n"
        "from pathlib import Path\n"
        "glob = Path.glob\n"
        "Path.glob = lambda self, pattern: iter(()) if pattern == '_kernels*.so' else glob(self, pattern)\n"
        "from piip_core.ops import ms_deform_attn, operator_status\n"
        "call = lambda: ms_deform_attn(torch.ones(1, 1, 1, 1), [(1, 1)], torch.ones(1, 1, 1, 1, 1, 2),"
        " torch.ones(1, 1, 1, 1, 1))\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    call(); call()\n"
        "print(operator_status.compiled, [str(w.message) for w in caught])\n"
    )
    result = run_python(script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("False ['The compiled deformable-attention operator is not available")
    assert result.stdout.count("is not available") == 1
    assert "pip install --no-build-isolation" in result.stdout
