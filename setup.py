"""Builds the compiled multi-scale deformable attention operator; everything static is in pyproject.toml.

Environment variables read here:
    CUDA_HOME               compile the CUDA kernels too, with this toolkit
    FORCE_CUDA              1: compile the CUDA kernels with the nvcc that torch finds; 0: never compile them
    TORCH_CUDA_ARCH_LIST    GPU architectures to compile for (default below)
    PIIP_BUILD_EXTENSION    0: install without the compiled operator; require: fail when it cannot be built
    MAX_JOBS                number of parallel compiler processes

A visible GPU plays no part: machines that build are often not the machines that run.
"""

import json
import os
import sys
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        f"piip compiles an operator against PyTorch, and PyTorch cannot be imported here ({error}).\n"
        "Install it first, then build in the same environment:\n"
        "    pip install torch torchvision ninja\n"
        "    pip install --no-build-isolation -e ."
    ) from error

ROOT = Path(__file__).resolve().parent
LIBRARY = "piip_core._kernels"  # not _C, as older ones that define the operators themselves
BUILD_INFO = Path("piip_core", "_build_info.json")
# Only libtorch's stable C++ ABI of this release is used, so one binary serves torch 2.10 and everything after it.
STABLE_ABI = "0x020A000000000000"
# Machine code for Turing, Ampere (which Ada runs too) and Hopper; later GPUs compile the PTX at first use.
DEFAULT_CUDA_ARCHITECTURES = "7.5;8.0;9.0+PTX"


def decide_cuda() -> tuple[bool, str]:
    """Says whether the CUDA kernels are to be compiled, and why."""
    force, home = os.environ.get("FORCE_CUDA", ""), os.environ.get("CUDA_HOME", "")
    if force == "0":
        return False, "FORCE_CUDA=0"
    if force != "1" and not home:
        return False, "neither CUDA_HOME nor FORCE_CUDA=1 is set"
    asked = "FORCE_CUDA=1" if force == "1" else f"CUDA_HOME={home}"
    if torch.version.cuda is None:
        return False, f"{asked}, but torch {torch.__version__} is built without CUDA"
    if cpp_extension.CUDA_HOME is None:
        return False, f"{asked}, but no CUDA toolkit with nvcc was found"
    return True, asked


def cuda_directories() -> tuple[list[str], list[str]]:
    """Include and library directories beyond nvcc's own.

    Torch's wheels bring the CUDA headers as nvidia packages, newer than or missing from a minimal toolkit, and a
    toolkit that was found through a wrapper on the PATH does not tell where its libcudart.so is.
    """
    packages = Path(torch.__file__).resolve().parent.parent / "nvidia"
    include = [str(path) for path in sorted(packages.glob("*/include")) if path.is_dir()]
    candidates = [Path(root, lib) for root in (cpp_extension.CUDA_HOME, "/usr/local/cuda") for lib in ("lib64", "lib")]
    return include, [str(path) for path in candidates if (path / "libcudart.so").exists()][:1]


def operator_extension(cuda: bool):
    """The operator as a plain shared library (no Python code inside; torch.ops.load_library opens it)."""
    macros = [("TORCH_TARGET_VERSION", STABLE_ABI)]
    # No -march: the sources select AVX2 or AVX-512 code at run time, so a wheel runs on every x86-64.
    # Sampling needs floor() and fused multiply-add vectorised, but NaN and infinity must keep their meaning.
    # -Wno-psabi: vectors are passed between inlined functions only, so how the ABI passes them is of no concern.
    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi"]
    cxx.append(f"-fmacro-prefix-map={ROOT}{os.sep}=")  # no absolute path of this machine in error messages
    arguments = {
        "name": LIBRARY,
        "sources": sorted(glob("csrc/cpu/*.cpp")),
        "depends": sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)),
        "define_macros": macros,
        "include_dirs": [str(ROOT / "csrc")],
        "extra_compile_args": {"cxx": cxx},
        "py_limited_api": True,
    }
    if not cuda:
        return cpp_extension.CppExtension(**arguments)
    include, libraries = cuda_directories()
    arguments["sources"] += sorted(glob("csrc/cuda/*.cu"))
    # -DUSE_CUDA: libtorch's C API hides its CUDA part otherwise.
    nvcc = ["-O3", "-DUSE_CUDA", "-Xcompiler", cxx[-1]]
    # -isystem: nvcc's own headers win where both have a file.
    nvcc += [flag for path in include for flag in ("-isystem", path)]
    arguments["extra_compile_args"]["nvcc"] = nvcc
    macros.append(("PIIP_WITH_CUDA", None))
    return cpp_extension.CUDAExtension(**arguments, library_dirs=libraries)


class BuildOperator(cpp_extension.BuildExtension):
    """Builds the best operator it can, never fails the installation, and records what it did."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, no_python_abi_suffix=True, **kwargs)

    def run(self):
        """Builds what can be built here, and says what is left out."""
        wish = os.environ.get("PIIP_BUILD_EXTENSION", "1")
        cuda, cuda_reason = decide_cuda()
        say(f"CUDA kernels: {'yes' if cuda else 'no'} ({cuda_reason})")
        info = {"built": False, "cuda": False, "cuda_reason": cuda_reason, "torch": torch.__version__, "errors": []}
        if cuda:
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
            info["cuda_architectures"] = os.environ["TORCH_CUDA_ARCH_LIST"]
        if wish == "0":
            info["errors"].append("PIIP_BUILD_EXTENSION=0: not built, as asked")
        for with_cuda in [] if wish == "0" else [True, False] if cuda else [False]:
            error = self.attempt(with_cuda)
            if error is None:
                info.update(built=True, cuda=with_cuda)
                break
            info["errors"].append(f"{'CUDA' if with_cuda else 'C++'} build failed: {error}")
        for error in info["errors"]:
            say(f"WARNING: {error}")
        if wish == "require" and info["errors"]:
            raise SystemExit("piip: PIIP_BUILD_EXTENSION=require, and the build above failed")
        if cuda and not info["cuda"]:
            info["cuda_reason"] += f", but {info['errors'][0]}"
        if not info["built"]:
            self.remove_stale_operators()
            say(
                "WARNING: installing WITHOUT the compiled deformable-attention operator. Everything works on the "
                "PyTorch reference, several times slower. To get it: install a C++20 compiler (g++ or clang++) and "
                "ninja, then run pip install --no-build-isolation -v -e . again."
            )
        target = (ROOT if self.inplace else Path(self.build_lib)) / BUILD_INFO
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_suffix(".tmp")
        aside.write_text(json.dumps(info, indent=1) + "\n")
        os.replace(aside, target)

    def attempt(self, cuda: bool) -> "str | None":
        """One build; returns the error's text, or None when it worked."""
        extension, inplace = self.extensions[0], self.inplace
        extension.__dict__.update(operator_extension(cuda).__dict__)
        self.compiler = None
        try:
            super().run()
        except (Exception, SystemExit) as error:  # compilers, linkers and distutils fail in every possible way
            return f"{type(error).__name__}: {error}".strip().splitlines()[0]
        finally:
            self.inplace = inplace
        return None

    def remove_stale_operators(self):
        """Removes those of earlier builds, which nothing replaces now."""
        for folder in (Path(self.build_lib), ROOT) if self.inplace else (Path(self.build_lib),):
            for path in folder.glob("piip_core/_kernels*.so"):
                path.unlink()
        self.extensions = []


def say(text: str):
    """pip shows this with -v; piip_core repeats it at first use, and so does python -m piip_core.doctor."""
    print(f"piip: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.chdir(ROOT)
    project = "projects/PIIP"
    setup(
        license="MIT",
        packages=[
            *find_packages(include=["piip_core", "piip_core.*", "llava_piip", "llava_piip.*"]),
            *find_packages(project, include=["piip", "piip.*"]),
            *find_packages("tools", include=["piip_tools", "piip_tools.*"]),
            *find_packages("datasets", include=["piip_digits"]),
        ],
        package_dir={
            "piip": f"{project}/piip",
            "piip_tools": "tools/piip_tools",
            "piip_digits": "datasets/piip_digits",
        },
        ext_modules=[operator_extension(cuda=False)],
        cmdclass={"build_ext": BuildOperator},
        # The library does not touch Python's C API at all: one wheel for every supported Python.
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
