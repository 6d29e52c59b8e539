"""The steps of tools/gpu_check.py, each in a process of its own."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = 77
"""Exit status of a step that needs what is not installed."""

TOLERANCE = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 2e-2}
Item = str | dict[str, Any]  # a sentence, or a row of a table
Steps = Iterator[Item]


def machine(device: str, small: bool) -> Steps:
    """What this runs on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "CPU threads": torch.get_num_threads()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"GPU": properties.name, "sm": _architecture(), "GiB": properties.total_memory / 2**30}
        found |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
        call = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version,clocks.sm", "--format=csv"], capture_output=True
        )
        found["driver, clock"] = ", ".join(call.stdout.decode().splitlines()[1:])
    for name in ("timm", "transformers", "detectron2", "kernels", "pytest", "ninja"):
        found[name] = "installed" if importlib.util.find_spec(name) else "not installed"
    yield from ({"what": name, "": value} for name, value in found.items())


def build(device: str, small: bool) -> Steps:
    """Compiles the operator in place, on a GPU for its architecture alone."""
    from torch.utils.cpp_extension import CUDA_HOME

    if device == "cuda" and CUDA_HOME is None:
        yield "Left out: compiling, because no nvcc was found."
    else:
        settings = {"PIIP_BUILD_EXTENSION": "require", "FORCE_CUDA": "1" if device == "cuda" else "0"}
        settings |= {"TORCH_CUDA_ARCH_LIST": _architecture()} if device == "cuda" else {}
        # --force: setup.py cannot tell that a library was made for another GPU, or for none
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--force"]
        _output_of(command, **settings)
    yield _compiled_operator(device)


def operator(device: str, small: bool) -> Steps:
    """Output and gradients at all shapes against float64, in every precision, also deterministic."""
    from .benchmarks.operators import DTYPES, operator_errors

    yield _compiled_operator(device)
    yield "Largest difference from the reference in float64, over its largest number."
    choices = itertools.product(_cases(device, small), TOLERANCE.items(), (False, True))
    wrong = 0
    for case, (dtype, tolerance), deterministic in choices:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        errors, repeatable = operator_errors(case, DTYPES[dtype], device)
        # A location in float32 is rounded to a part of the side of the map
        tolerance = max(tolerance, 2**-22 * max(itertools.chain(*case.value_shapes)))
        passed = max(errors.values()) < tolerance and (repeatable or not deterministic)
        wrong += not passed
        what = f"{case.name}, {dtype}{', deterministic' * deterministic}"
        errors = {name: errors.get(name) for name in ("output", "value", "sampling", "locations", "weights")}
        yield {"what": what} | errors | {"repeatable": repeatable, "allowed": tolerance, "": _verdict(passed)}
    _fail_if(wrong, "failed")


def operator_tests(device: str, small: bool) -> Steps:
    """The operator's own tests on the device, by pytest."""
    _need("pytest", importlib.util.find_spec("pytest"))
    files = [f"tests/piip_core/ops/test_{name}.py" for name in ("functional", "grid", "deconvolution")]
    chosen = f"{device} and (gradcheck or empty)" if small else device
    yield _output_of([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files])


def sanitizer(device: str, small: bool) -> Steps:
    """The small shapes of `operator` under compute-sanitizer, with memory that PyTorch does not keep."""
    folders = [os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    _need("compute-sanitizer", tool)
    command = [sys.executable, "-m", "piip_tools.gpu_steps", "operator", "--device", device, "--small", os.devnull]
    yield _output_of([tool, "--error-exitcode", "9", *command], PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def goldens(device: str, small: bool) -> Steps:
    """Recorded cases of the public implementation in float32 without TF32, and under autocast to bfloat16."""
    from checkers import Status, find_cases, run_cases

    families = {"op", "interaction", "detection", "segmentation", "classification", "llava"}
    families |= {"detection_head", "segmentation_head", "segmentation_inference"}
    families |= {f"dino_{name}" for name in ("decoder", "encoder", "loss", "dn")}
    cases = [case for case in find_cases([ROOT / "tests" / "data" / "goldens"]) if case.family in families]
    if small:
        cases = [case for case in cases if case.name in ("msdeform_fp32", "cls3_deit", "head_mask_rcnn_b")]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield "Largest difference over the largest number recorded; in bfloat16 of outputs alone, at most 5 % allowed."
    wrong = 0
    for dtype in ("fp32", "bf16"):
        if dtype == "bf16":  # heads choose among boxes, which rounding changes
            cases = [case for case in cases if "head" not in case.family and "dino" not in case.family]
        autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16")
        with torch.device(device), autocast:
            for result in run_cases(cases):
                if result.status is Status.NOT_SUPPORTED:
                    yield f"Left out: {result.name}, {result.reason}."
                    continue
                errors = {kind: result.worst(kind) for kind in ("output", "inter", "grad")}
                failed = result.status is Status.FAILED
                if dtype == "bf16" and not result.reason:  # gradients of locations jump where rounding moves them
                    failed = max(errors["output"] or 0, errors["inter"] or 0) > 5e-2
                    errors["grad"] = None
                wrong += failed
                yield {"case": result.name, "dtype": dtype} | errors | {"": _verdict(not failed)}
                print(result)
    _fail_if(wrong, "failed")


def operator_speed(device: str, small: bool) -> Steps:
    """The operator beside PyTorch's formulation, transformers' kernel, and copies of memory."""
    from .benchmarks.operators import copy_of, measure_operator, transformers_layer
    from .timing import clock_for, kernel_seconds, time_in_turns

    yield _compiled_operator(device)
    size = 2**24 if small else 2**30
    copy = copy_of(size, device)
    if device == "cuda":
        seconds = min(kernel_seconds(copy) for _ in range(3))
    else:
        seconds = min(time_in_turns({"copy": copy}, 3, clock_for(device, torch.get_num_threads()))["copy"])
    bandwidth = 2 * size / seconds
    yield f"A copy of {size >> 20} MiB reads and writes {1e-9 * bandwidth:.0f} GB/s. Times are milliseconds."
    layer = None
    try:
        layer = transformers_layer(device)
    except Exception as error:  # not installed, no network, no build for this PyTorch
        yield f"Left out: transformers' kernel ({error})."
    options = dict(device=device, repeats=1 if small else 5, threads=torch.get_num_threads())
    for case, dtype in itertools.product(_cases(device, small), TOLERANCE):
        try:
            rows = measure_operator([case], [dtype], layer=layer, **options)
        except RuntimeError as error:  # theirs has no kernel for some dtypes
            yield f"Left out: transformers' kernel, {case.name}, {dtype} ({str(error).splitlines()[0]})."
            rows = measure_operator([case], [dtype], **options)
        for row in rows:
            times = {name: row["medians"].get(name) for name in ("ours", "pytorch", "transformers", "copy")}
            speed = row["bytes"] / (1e-3 * times["ours"])
            ratios = {f"{name} : ours": times[name] and times[name] / times["ours"] for name in list(times)[1:]}
            bytes_moved = {"GB/s": 1e-9 * speed, "of the large copy": speed / bandwidth}
            yield {"what": row["what"]} | times | ratios | bytes_moved


def triton(device: str, small: bool) -> Steps:
    """`operator` and `operator_speed` of two shapes with the kernels in Triton, on a CPU in its interpreter."""
    _need("triton", importlib.util.find_spec("triton"))
    # Before the first import of the operator and of Triton
    os.environ["PIIP_DISABLE_EXTENSION"] = "compiled"
    os.environ["TRITON_INTERPRET"] = str(int(device == "cpu"))
    yield from operator(device, small)
    yield from operator_speed(device, small)


def _backbones(device: str, small: bool, *, compiled: bool) -> Steps:
    """PIIP-TSB and SBL beside ViTDet-B and L: forward passes, training steps, peak memory."""
    from .benchmarks.backbones import TimedModel, measure_backbones, piip_models, timm_vitdet

    threads = torch.get_num_threads()
    compile_ = partial(torch.compile, backend="aot_eager" if small else "inductor")
    yield "ViTDet is timm's encoder of SAM: the same network, ending in one map. Training is float32 under autocast."
    pairs = [("piip_tsb_1568_1120_672", "vitdet_b"), ("piip_sbl_1568_1120_672", "vitdet_l")]
    for name, baseline in pairs[:1] if small else pairs:
        if small:
            tiny = TimedModel(name="tiny", form="ours", build=_tiny_pyramid, image_size=128)
            models = [tiny, timm_vitdet(baseline, 0.1, depth=2)]
        else:
            models = [*piip_models([name], ["ours"]), timm_vitdet(baseline)]
        if compiled:
            models = [replace(model, build=lambda build=model.build: compile_(build())) for model in models]
        for training, precision in ((False, "bf16"), (True, "amp")):
            options = dict(training=training, device=device, repeats=1 if small else 5, threads=threads)
            for row in measure_backbones(models, [precision], **options):
                what = f"{row['what']}, {'training step' if training else 'forward'}, {row['unit']}"
                ours, theirs = row["medians"]["ours"], row["medians"][baseline]
                yield {"what": what, "ours": ours, "baseline": theirs, "ours : baseline": ours / theirs}


def memory(device: str, small: bool) -> Steps:
    """The memory estimate of a training step, with and without activation checkpointing, against what it takes."""
    from piip_core import DensePIIP, zoo

    from .memory.dry_run import DryRun, backbone_step, squares
    from .memory.estimate import Setting, estimate_memory
    from .timing import peak_memory

    name = "piip_tsb_1568_1120_672"
    build, side = (_tiny_pyramid, 512) if small else (lambda: DensePIIP(zoo.get(name).config), 1568)
    with torch.device("meta"):
        run = DryRun(build())
    setting = Setting(batch_size=1, input_size=(side, side), gpus=1)
    estimates = estimate_memory(name, run, backbone_step(1, (side, side)), setting).estimates[:3]
    with torch.device(device):
        model, image = build().train(), torch.randn(1, 3, side, side)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = squares(model(image))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for estimate in estimates:
        model.set_grad_checkpointing(estimate.checkpointing)
        step()  # makes the optimizer's state
        moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
        held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *moments))
        measured = held + peak_memory(step, model, device)
        yield {
            "what": f"{'tiny' if small else name} at {side}, checkpointing {estimate.checkpointing}",
            "estimate, MB": 1e-6 * estimate.total,
            "measured, MB": 1e-6 * measured,
            "estimate : measured": estimate.total / measured,
        }


def chat(device: str, small: bool) -> Steps:
    """A quarter-width PIIP-LLaVA beside LLaVA-1.5: first token, tokens per second."""
    _need("transformers", importlib.util.find_spec("transformers"))
    from .benchmarks.chat import build_pair, measure_chat

    pair = build_pair("piip_llava_clip_bl_512_256_7b", device=device, divide_widths=4)
    options = dict(new_tokens=2, repeats=1, text_tokens=8) if small else dict(new_tokens=64, repeats=5)
    for row in measure_chat(pair, threads=torch.get_num_threads(), **options):
        ours, theirs = (row["medians"][timed.name] for timed in pair)
        yield {"what": f"{row['what']}, {row['unit']}", "PIIP-LLaVA": ours, "LLaVA-1.5": theirs, "ratio": ours / theirs}


STEPS: Mapping[str, Callable[[str, bool], Steps]] = {
    "machine": machine,
    "build": build,
    "operator": operator,
    "operator_tests": operator_tests,
    "sanitizer": sanitizer,
    "goldens": goldens,
    "operator_speed": operator_speed,
    "triton": triton,
    "backbones": partial(_backbones, compiled=False),
    "memory": memory,
    "chat": chat,
    "compiled": partial(_backbones, compiled=True),
}
"""What tools/gpu_check.py starts, by name."""


def _tiny_pyramid() -> nn.Module:
    from piip_core import BranchConfig, DensePIIP, InteractionConfig, PIIPConfig, ViTConfig

    sizes = ((32, 64), (24, 96), (16, 128))
    branches = tuple(
        BranchConfig(network=ViTConfig(embed_dim=dim, depth=2, num_heads=dim // 8, pos_grid=4), image_size=side)
        for dim, side in sizes
    )
    return DensePIIP(PIIPConfig(branches=branches, interaction=InteractionConfig(num_interactions=2, num_heads=4)))


def _architecture() -> str:
    return ".".join(map(str, torch.cuda.get_device_capability()))


def _need(what: str, found: object) -> None:
    if not found:
        print(f"needs {what}, which is not installed")
        sys.exit(LEFT_OUT)


def _output_of(command: Sequence[str], **environment: str) -> str:
    """The last line that a process prints; all of them are printed."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    _fail_if(done.returncode, "exit status")
    return (done.stdout.strip().splitlines() or [""])[-1]


def _verdict(passed: bool) -> str:
    return "passed" if passed else "FAILED"


def _fail_if(wrong: int, what: str) -> None:
    if wrong:
        raise SystemExit(f"{what}: {wrong}")


def _compiled_operator(device: str) -> str:
    from piip_core.ops import operator_status as status

    if device in status.triton:
        return f"Kernels: Triton's, the compiled operator: {status.reason}."
    if not (status.cuda_version if device == "cuda" else status.compiled):
        raise SystemExit(f"no kernels for {device}: {status.reason}, {status.build}")
    return f"Kernels: {status.cpu_capability}, CUDA {status.cuda_version}, {status.build}."


def _cases(device: str, small: bool) -> Sequence[Any]:
    """The operator's shapes; few for Triton, which compiles for each of them, and a tiny one for its interpreter."""
    from piip_core.ops import operator_status

    from .benchmarks.operators import CASES, Case

    if device in operator_status.triton:
        tiny = Case(name="tiny", query_shape=(3, 4), value_shapes=((4, 5),), width=6, heads=2)
        return [tiny] if small else CASES[::7]
    return CASES[4:6] if small else CASES


def main(arguments: Sequence[str]) -> None:
    """Runs a step, and appends what it finds to a file as soon as it is known, a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("results", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args(arguments)
    for item in STEPS[args.step](args.device, args.small):
        with args.results.open("a") as file:
            file.write(json.dumps(item) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
