"""The arithmetic of the CUDA kernels without a GPU: compiled for the CPU, run by an emulator, held to float64.

What a GPU alone can show (speed, atomics in a race, the host's side) is left to tests that run where there is one.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from piip_core.ops import ms_deform_attn_reference
from piip_core.ops.reference import deform_attn_grid_reference

HERE = Path(__file__).parent
SOURCES = HERE.parents[3] / "csrc"
SHAPES = ((5, 7), (3, 2), (1, 4))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Width, pack and threads of a group as the host chooses them, and groups that take several turns.
CASES = {
    torch.float32: [(6, 2, 3), (12, 4, 3), (24, 4, 6), (7, 1, 7), (40, 4, 10), (100, 4, 25), (71, 1, 32), (6, 1, 1)],
    torch.bfloat16: [(24, 8, 3), (40, 8, 5), (6, 1, 6)],
}
ALL_CASES = [(dtype, *case) for dtype, cases in CASES.items() for case in cases]


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in "batch values heads width queries levels points".split()]


class Call(ctypes.Structure):
    _fields_ = [
        ("sizes", Sizes),
        *((name, ctypes.c_int32) for name in "lines columns threads_of_a_group bits_of_offsets fixed_point".split()),
        ("shapes", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_void_p) for name in "value grad_output sampling locations weights".split()),
        *((name, ctypes.c_void_p) for name in "output grad_value grad_sampling grad_locations grad_weights".split()),
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    include = [f"-I{path}" for path in (HERE, SOURCES, Path(torch.__file__).parent / "include")]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    subprocess.run([compiler, *flags, *include, HERE / "emulated_kernels.cpp", "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    for entry in (loaded.run_float, loaded.run_bfloat16, loaded.run_broken_kernel):
        entry.restype = ctypes.c_char_p
    return loaded


def run(kernels, inputs, pack: int, *, threads: int, bits: int = 32, fixed_point: bool = False, **tensors: Tensor):
    """One call of a kernel on the CPU; `tensors` besides value are those of `Call`, results are written to them."""
    batch, values, heads, width = inputs.value.shape
    levels, points = inputs.weights.shape[3:]
    sizes = Sizes(batch, values, heads, width, inputs.weights.shape[1], levels, points)
    shapes = (ctypes.c_int64 * len(inputs.flat_shapes))(*inputs.flat_shapes)
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    call = Call(
        sizes=sizes,
        lines=1,
        columns=inputs.weights.shape[1],
        threads_of_a_group=threads,
        bits_of_offsets=bits,
        fixed_point=fixed_point,
        shapes=shapes,
        value=inputs.value.data_ptr(),
        **pointers,
    )
    entry = kernels.run_float if inputs.value.dtype == torch.float32 else kernels.run_bfloat16
    error = entry(ctypes.byref(call), pack)
    assert error is None, error


def general(kernels, inputs, pack, **options) -> list[Tensor]:
    """Output and gradients of the general form."""
    tensors = {"locations": inputs.locations, "weights": inputs.weights}
    output, *grads = [torch.full_like(x, torch.nan) for x in (inputs.grad_output, *inputs.leaves)]
    run(kernels, inputs, pack, output=output, **tensors, **options)
    names = ("grad_value", "grad_locations", "grad_weights")
    results = dict(zip(names, grads, strict=True))
    run(kernels, inputs, pack, grad_output=inputs.grad_output, **tensors, **results, **options)
    return [output, *grads]


def fused(kernels, inputs, sampling, pack, **options) -> list[Tensor]:
    """Output and gradients of the fused form."""
    output, *grads = [torch.full_like(x, torch.nan) for x in (inputs.grad_output, inputs.value, sampling)]
    run(kernels, inputs, pack, sampling=sampling, output=output, **options)
    results = dict(zip(("grad_value", "grad_sampling"), grads, strict=True))
    run(kernels, inputs, pack, sampling=sampling, grad_output=inputs.grad_output, **results, **options)
    return [output, *grads]


def with_gradients(function, leaves, grad_output) -> list[Tensor]:
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    output = function(*leaves)
    return [output, *torch.autograd.grad(output, leaves, grad_output.double())]


def expected_general(inputs) -> list[Tensor]:
    def reference(value, locations, weights):
        return ms_deform_attn_reference(value, inputs.flat_shapes, locations, weights)

    return with_gradients(reference, inputs.leaves, inputs.grad_output)


def expected_fused(inputs, sampling) -> list[Tensor]:
    query_shape, points = (1, sampling.shape[1]), inputs.weights.shape[4]

    def reference(value, offsets_and_logits):
        return deform_attn_grid_reference(value, inputs.flat_shapes, query_shape, offsets_and_logits, points)

    return with_gradients(reference, (inputs.value, sampling), inputs.grad_output)


def assert_all_close(actual, expected, dtype):
    for ours, theirs in zip(actual, expected, strict=True):
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize(("dtype", "width", "pack", "threads"), ALL_CASES, ids=str)
@pytest.mark.parametrize("fixed_point", [False, True], ids=["atomic", "fixed_point"])
def test_general_form(kernels, make_inputs, dtype, width, pack, threads, fixed_point):
    inputs = make_inputs(3, 3, width, 13, SHAPES, dtype=dtype)
    actual = general(kernels, inputs, pack, threads=threads, fixed_point=fixed_point)
    assert_all_close(actual, expected_general(inputs), dtype)


@pytest.mark.parametrize(("dtype", "width", "pack", "threads"), ALL_CASES, ids=str)
@pytest.mark.parametrize("fixed_point", [False, True], ids=["atomic", "fixed_point"])
def test_fused_form(kernels, make_inputs, dtype, width, pack, threads, fixed_point):
    inputs = make_inputs(3, 3, width, 13, SHAPES, dtype=dtype)
    sampling = inputs.sampling().to(inputs.value.dtype)
    actual = fused(kernels, inputs, sampling, pack, threads=threads, fixed_point=fixed_point)
    assert_all_close(actual, expected_fused(inputs, sampling), dtype)


def test_long_offsets(kernels, make_inputs):
    inputs = make_inputs(dtype=torch.float32)
    for ours, theirs in zip(
        general(kernels, inputs, 2, threads=3, bits=64), general(kernels, inputs, 2, threads=3), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_fixed_point_does_not_depend_on_the_order(kernels, make_inputs):
    """Queries in another order add up the same gradients of the values in another order."""
    inputs = make_inputs(1, 2, 6, 101, ((2, 3),), dtype=torch.float32)
    order = torch.randperm(101, generator=torch.Generator().manual_seed(1))
    shuffled = make_inputs(1, 2, 6, 101, ((2, 3),), dtype=torch.float32)
    for name in ("locations", "weights", "grad_output"):
        setattr(shuffled, name, getattr(shuffled, name)[:, order].contiguous())
    one, other = (general(kernels, x, 2, threads=3, fixed_point=True)[1] for x in (inputs, shuffled))
    assert torch.equal(one, other)
    floating = [general(kernels, x, 2, threads=3)[1] for x in (inputs, shuffled)]
    assert not torch.equal(*floating)  # which floating point does not give


def test_what_is_not_finite(kernels, make_inputs):
    """A location that is NaN or infinite is outside; a gradient that is not finite makes a fixed-point gradient NaN."""
    inputs = make_inputs(1, 2, 6, 5, dtype=torch.float32)
    inputs.locations[0, 0, 0, 0, 0, 0] = torch.nan
    inputs.locations[0, 1, 1, 0, 2, 1] = torch.inf
    away = make_inputs(1, 2, 6, 5, dtype=torch.float32)
    away.locations[0, 0, 0, 0, 0, 0] = away.locations[0, 1, 1, 0, 2, 1] = 7.0
    for ours, theirs in zip(general(kernels, inputs, 2, threads=3), general(kernels, away, 2, threads=3), strict=True):
        assert torch.equal(ours, theirs)
    inputs.grad_output[0, 0, 0] = torch.inf
    assert general(kernels, inputs, 2, threads=3, fixed_point=True)[1].isnan().all()


def test_extreme_logits(kernels, make_inputs):
    inputs = make_inputs(1, 2, 6, 5, dtype=torch.float32)
    sampling = inputs.sampling().to(inputs.value.dtype)
    sampling[..., 2 * sampling.shape[2] // 3 :] *= 1e4
    assert_all_close(fused(kernels, inputs, sampling, 2, threads=3), expected_fused(inputs, sampling), torch.float32)


def test_the_emulator_finds_threads_that_miss_a_shuffle(kernels):
    assert b"do not meet" in kernels.run_broken_kernel()
