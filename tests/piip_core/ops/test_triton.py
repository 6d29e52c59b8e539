"""Triton's kernels, which no GPU has run: their numbers in Triton's interpreter, and that they compile for GPUs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from piip_core.ops import (
    deform_attn_grid,
    deform_attn_grid_reference,
    ms_deform_attn,
    ms_deform_attn_reference,
    operator_status,
)
from piip_core.ops.reference import ms_deform_attn_backward_reference

pytest.importorskip("triton")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
SHAPES = ((5, 7), (0, 3), (3, 2))
INTERPRETER = {"PIIP_DISABLE_EXTENSION": "compiled", "TRITON_INTERPRET": "1"}
interpreted = "cpu" in operator_status.triton


def relative_errors(ours, exact):
    return [
        ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() for a, b in zip(ours, exact, strict=True)
    ]


def results(call, leaves, grad):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = call(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


if interpreted:

    @pytest.fixture(autouse=True)
    def _few_programs(monkeypatch, request):
        """Each takes the interpreter a while, whatever its size."""
        from piip_core.ops import triton_kernels

        if "programs" not in request.node.name:
            monkeypatch.setattr(triton_kernels, "_TILE", 4096)

    def check(inputs, fused_only=False):
        """Both operators, outputs and gradients, against float64; queries of the fused form are a line."""
        sampling = inputs.sampling().to(inputs.value.dtype)
        queries = (1, sampling.shape[1])
        points = inputs.weights.shape[-1]
        forms = (
            (
                lambda *leaves: ms_deform_attn(leaves[0], inputs.spatial_shapes, *leaves[1:]),
                lambda *leaves: ms_deform_attn_reference(leaves[0], inputs.flat_shapes, *leaves[1:]),
                inputs.leaves,
            ),
            (
                lambda *leaves: deform_attn_grid(leaves[0], inputs.spatial_shapes, queries, leaves[1], points),
                lambda *leaves: deform_attn_grid_reference(leaves[0], inputs.flat_shapes, queries, leaves[1], points),
                (inputs.value, sampling),
            ),
        )
        for call, reference, leaves in forms[fused_only:]:
            exact = results(reference, [leaf.double() for leaf in leaves], inputs.grad_output.double())
            ours = results(call, leaves, inputs.grad_output)
            assert [a.dtype for a in ours] == [inputs.value.dtype, *[leaf.dtype for leaf in leaves]]
            assert max(relative_errors(ours, exact)) < TOLERANCE[inputs.value.dtype]

    ALL = [(6, dtype) for dtype in TOLERANCE] + [(12, torch.bfloat16), (24, torch.float16), (32, torch.float32)]
    ALL += [(40, torch.bfloat16), (64, torch.float16), (100, torch.float32), (100, torch.bfloat16)]

    @pytest.mark.parametrize(("width", "dtype"), ALL, ids=str)
    def test_widths(make_inputs, width, dtype):
        if width == 6:
            check(make_inputs(1, 2, width, 3, points=2, dtype=dtype))
        else:  # the two forms go through the same tiles
            check(make_inputs(1, 2, width, 3, points=1, dtype=dtype), fused_only=True)

    def test_several_programs_and_tiles_of_channels(make_inputs):
        check(make_inputs(1, 3, 130, 2, points=1, dtype=torch.float32))

    def test_levels_far_samples_and_strides(make_inputs):
        """Two images, three levels of which one is empty, samples anywhere, nothing contiguous."""
        inputs = make_inputs(2, 3, 5, 4, SHAPES, 1)
        inputs.locations[:, 0, 0] = 1e30
        inputs.locations[:, 1, 1, :, :, 0] = -3.0
        names = ("value", "locations", "weights", "grad_output")
        for name in names:
            setattr(inputs, name, torch.stack((getattr(inputs, name),) * 2, dim=-1)[..., 1])
        check(inputs)

    def test_deterministic_sums_are_in_fixed_point(make_inputs):
        inputs = make_inputs(1, 2, 6, 4, points=2, dtype=torch.float32)
        arguments = inputs.value, inputs.flat_shapes, inputs.locations, inputs.weights
        backward = torch.ops.piip.ms_deform_attn_backward
        sums, fixed = (backward(inputs.grad_output, *arguments, deterministic) for deterministic in (False, True))
        exact = [tensor.double() if isinstance(tensor, torch.Tensor) else tensor for tensor in arguments]
        exact = ms_deform_attn_backward_reference(inputs.grad_output.double(), *exact)
        assert max(relative_errors(fixed, exact)) < 1e-6
        assert not torch.equal(sums[0], fixed[0]) and torch.equal(sums[1], fixed[1])
        inputs.grad_output[0, 0, 0] = torch.nan
        assert backward(inputs.grad_output, *arguments, True)[0].isnan().all()  # rather than wrong

    def test_compiled_graph(make_inputs):
        inputs = make_inputs(1, 2, 6, 4, points=1, dtype=torch.float32)
        queries, sampling = (2, 2), inputs.sampling()
        compiled = torch.compile(deform_attn_grid, fullgraph=True, backend="aot_eager")

        def call(function):
            return lambda value, sampling: function(value, inputs.spatial_shapes, queries, sampling, 1)

        leaves = inputs.value, sampling
        compiled, eager = (results(call(f), leaves, inputs.grad_output) for f in (compiled, deform_attn_grid))
        assert all(map(torch.equal, compiled, eager))

    @pytest.mark.parametrize("sizes", [dict(points=0), dict(queries=0), dict(spatial_shapes=((0, 4),)), dict(batch=0)])
    def test_nothing_to_do(make_inputs, sizes):
        inputs = make_inputs(**sizes, dtype=torch.float32)
        leaves = [leaf.nan_to_num() for leaf in inputs.leaves]
        call = lambda *leaves: ms_deform_attn(leaves[0], inputs.spatial_shapes, *leaves[1:])  # noqa: E731
        assert all((result == 0).all() for result in results(call, leaves, inputs.grad_output))

    def test_what_does_not_fit_is_refused(make_inputs):
        """Also where the functions that check are passed by."""
        inputs = make_inputs(1, 2, 6, 4, points=2, dtype=torch.float32)
        for shapes, weights in (([5, 8], inputs.weights), ([-5, -7], inputs.weights), ([5, 7], inputs.weights[:, :3])):
            with pytest.raises(ValueError, match="do not fit"):
                torch.ops.piip.ms_deform_attn(inputs.value, shapes, inputs.locations, weights)

    def test_reference_where_triton_does_not_run(make_inputs, monkeypatch):
        from piip_core.ops import _library, triton_kernels

        def fail(*arguments):
            raise RuntimeError("Failed to find C compiler")

        monkeypatch.setattr(triton_kernels, "_launch", fail)
        _library._triton_kernels.cache_clear()
        try:
            with pytest.warns(RuntimeWarning, match="do not run on cpu: RuntimeError: Failed to find C compiler"):
                check(make_inputs(1, 2, 6, 4, points=2, dtype=torch.float32))
        finally:
            _library._triton_kernels.cache_clear()

else:

    def test_numbers_in_the_interpreter(tmp_path):
        """The tests above, and those of the operator that Triton's interpreter gets through in seconds."""
        folder = Path(__file__).parent
        report = tmp_path / "report.xml"
        chosen = "test_triton or nan_stays or outside_does_not_touch"
        files = [folder / name for name in ("test_triton.py", "test_grid.py")]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command += [f"--junitxml={report}", "-k", chosen, *map(str, files)]
        done = subprocess.run(command, cwd=folder, env=os.environ | INTERPRETER, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        counts = re.search(r'errors="(\d+)" failures="(\d+)" skipped="(\d+)" tests="(\d+)"', report.read_text())
        *failed, passed = map(int, counts.groups())
        assert failed == [0, 0, 0] and passed > 20

    def test_which_devices_it_serves(monkeypatch):
        from piip_core.ops import _library

        gpus = ("cuda",) * (torch.version.cuda is not None)
        for disabled, interpret, expected in (
            ("0", "0", gpus),
            ("", "1", gpus),
            ("1", "1", ()),
            ("compiled", "0", gpus),
            ("compiled", "1", (*gpus, "cpu")),
        ):
            monkeypatch.setenv("PIIP_DISABLE_EXTENSION", disabled)
            monkeypatch.setenv("TRITON_INTERPRET", interpret)
            assert _library._served_by_triton() == expected
        assert operator_status.triton == (() if operator_status.cuda_version else gpus)

    TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}

    def compile_call(kernel, arguments):
        """Compiles what a call would run on a GPU of compute capability 8.0; the compiler is part of Triton."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        signature, constants = {}, {}
        for place, (parameter, argument) in enumerate(zip(kernel.params, arguments, strict=True)):
            if isinstance(argument, torch.Tensor):
                signature[parameter.name] = TYPES[argument.dtype]
            elif isinstance(argument, tuple):
                signature[parameter.name] = ("i32",) * len(argument)
            else:
                signature[parameter.name] = "constexpr"
                constants[(place,)] = argument
        return compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32))

    def test_compiles_for_a_gpu(make_inputs, monkeypatch, tmp_path):
        from piip_core.ops import triton_kernels

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        compiled = []

        class Kernel:
            def __init__(self, kernel):
                self.kernel = kernel

            def __getitem__(self, grid):
                return lambda *arguments: compiled.append(compile_call(self.kernel, arguments))

        for name in ("_forward_kernel", "_backward_kernel"):
            monkeypatch.setattr(triton_kernels, name, Kernel(getattr(triton_kernels, name)))
        inputs = make_inputs(1, 2, 12, 3, dtype=torch.bfloat16)
        arguments = inputs.value, inputs.flat_shapes, (1, 3), inputs.sampling().bfloat16(), 4
        triton_kernels.deform_attn_grid(*arguments)
        triton_kernels.deform_attn_grid_backward(inputs.grad_output, *arguments)
        assert [len(kernel.asm["cubin"]) > 1000 for kernel in compiled] == [True, True]
