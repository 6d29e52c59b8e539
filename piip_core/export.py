"""Models as files that run without this project: `torch.export` programs and ONNX, checked against PyTorch.

The deformable-attention operator is replaced by standard operators (its PyTorch reference: `grid_sample`, which is
ONNX's GridSample), so that any runtime takes the file.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .classifier import PIIPClassifier
from .errors import UserError
from .files import flush, rename_durably
from .ops import deform_attn_grid_reference, ms_deform_attn_reference
from .ops.reference import gathering
from .pyramid import DensePIIP

logger = logging.getLogger(__name__)

MIN_OPSET, DEFAULT_OPSET = 16, 18
# ONNX files are protocol buffers, which end at 2 GB; beyond this the weights get a file of their own
MAX_BYTES_INSIDE = 1_500_000_000
MAX_RELATIVE_ERROR = 1e-3  # largest difference from PyTorch over the largest value of the output
INPUT = "image"


class ExportError(UserError):
    """A model cannot be exported, or the exported one computes something else."""


@dataclass(frozen=True, kw_only=True)
class ExportCheck:
    """How far a written file is from PyTorch, on a random image."""

    files: tuple[Path, ...]  # what was written; the first one is what a runtime opens
    max_error: float  # largest absolute difference of an output
    max_value: float  # largest absolute value of that output, for scale

    def __str__(self) -> str:
        size = sum(file.stat().st_size for file in self.files) / 1e6
        names = ", ".join(map(str, self.files))
        return (
            f"{names}: {size:.1f} MB; largest difference from PyTorch {self.max_error:.2e}, where outputs reach "
            f"{self.max_value:.2e}"
        )


def export_program(model: nn.Module, image_size: tuple[int, int], *, batch_size: int | None = None) -> ExportedProgram:
    """The model as a `torch.export` program of standard operators only, which needs nothing of this project.

    Args:
        model: `PIIPClassifier`, `DensePIIP` or another module that takes one float32 image (B, 3, H, W), on the CPU in
            float32. It is set to evaluation mode.
        image_size: Height and width, fixed in the program.
        batch_size: Images per call; None leaves it open.

    Raises:
        ExportError: If the model cannot be traced.
    """
    example, shapes = _example(model, image_size, batch_size)
    with torch.no_grad(), refusing(f"{type(model).__name__} at {image_size[0]} x {image_size[1]}"):
        program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    logger.info("replacing the operator by standard ones")
    return program.run_decompositions(
        {
            torch.ops.piip.deform_attn_grid.default: deform_attn_grid_reference,
            torch.ops.piip.ms_deform_attn.default: ms_deform_attn_reference,
        }
    )


def _example(model: nn.Module, image_size: tuple[int, int], batch_size: int | None) -> tuple[Tensor, Any]:
    """An image batch to trace a model with, which is checked and set to evaluation mode, and what is open in it."""
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ExportError(
                f"{name} is {parameter.dtype} on {parameter.device}: expected float32 on the CPU (model.float().cpu())"
            )
    model.eval()
    logger.info("tracing (a published model takes minutes)")
    # An example of one image would make programs of exactly one
    example = torch.zeros(batch_size or 2, 3, *image_size)
    return example, ({0: Dim("batch", min=1)} if batch_size is None else None,)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns errors of exporters into an ExportError of one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = error.__cause__ or error
        first_line = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        raise ExportError(f"{what} cannot be exported ({first_line})") from error


def save_program(
    model: nn.Module, path: str | os.PathLike[str], image_size: tuple[int, int], *, batch_size: int | None = None
) -> ExportCheck:
    """Writes a .pt2 file for `torch.export.load`, after a comparison of what it computes.

    Arguments and errors are those of `export_program`; it is an ExportError, too, if the file computes something else
    when loaded, and then no file is left.
    """

    def write(file: Path) -> Callable[[Tensor], list[Tensor]]:
        torch.export.save(export_program(model, image_size, batch_size=batch_size), file)
        loaded = torch.export.load(file).module()
        return lambda image: tensors_in(loaded(image))

    return write_checked(model, Path(path), _noise(batch_size or 1, image_size), write)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    image_size: tuple[int, int],
    *,
    batch_size: int | None = None,
    opset: int = DEFAULT_OPSET,
    gridsample: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> ExportCheck:
    """Writes an .onnx file, after a comparison of onnxruntime's results with PyTorch's.

    The input is named "image", the outputs "logits" (classifier) or "stride4", "stride8" ... (backbone).

    Args:
        model: As for `export_program`.
        path: File to write; the weights of a large model go to a second one beside it, named `path` + ".data".
        image_size: Height and width, fixed in the file.
        batch_size: Images per call; None leaves it open.
        opset: ONNX operator set, 16 (the first with GridSample) or later.
        gridsample: Whether deformable attention becomes GridSample, or Gather and arithmetic (TensorRT's GridSample
            has been wrong in such models).
        metadata: What to note in the file.

    Raises:
        ExportError: As for `save_program`, or if a package is missing.
    """

    def write(file: Path) -> Callable[[Tensor], list[Tensor]]:
        open_onnx = import_runtime(opset)
        example, shapes = _example(model, image_size, batch_size)
        what = f"{type(model).__name__} at {image_size[0]} x {image_size[1]}"
        with torch.no_grad(), refusing(what), gathering(not gridsample):
            onnx_program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=_output_names(model),
                dynamic_shapes=shapes,
                verbose=False,
            )
        assert onnx_program is not None  # with dynamo=True
        onnx_program.model.metadata_props.update(metadata or {})
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        onnx_program.save(file, external_data=size > MAX_BYTES_INSIDE)
        return open_onnx(file)

    return write_checked(model, Path(path), _noise(batch_size or 1, image_size), write)


def import_runtime(opset: int) -> Callable[[Path], Callable[[Tensor], list[Tensor]]]:
    """What opens an .onnx file of one input in onnxruntime.

    Raises:
        ExportError: If a package is missing, or the operator set is too old.
    """
    if opset < MIN_OPSET:
        raise ExportError(f"opset={opset}: expected {MIN_OPSET} or later, the first with GridSample")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise ExportError(
            f"ONNX export needs more packages ({error}): pip install onnx onnxscript onnxruntime"
        ) from None

    def open_onnx(file: Path) -> Callable[[Tensor], list[Tensor]]:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda image: [torch.from_numpy(found) for found in session.run(None, {INPUT: image.numpy()})]

    return open_onnx


def write_checked(
    model: nn.Module,
    path: Path,
    image: Tensor,
    write: Callable[[Path], Callable[[Tensor], list[Tensor]]],
    finish: Callable[[Path], None] = lambda _: None,
) -> ExportCheck:
    """Lets `write` make files in a folder aside and return what runs them, and renames them into place if they pass.

    They pass if they compute of the image what the model does. `finish` may change them then.
    """
    if not path.parent.is_dir():
        raise ExportError(f"{path}: there is no folder {path.parent}; make it, or name another file")
    # Files that know each other's names, on the disk of their destination
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".incomplete", dir=path.parent) as folder:
        run = write(Path(folder, path.name))
        logger.info("comparing with PyTorch")
        error, largest = _compare(model, run, image)
        if not error <= MAX_RELATIVE_ERROR * largest:  # NaN does not pass
            raise ExportError(
                f"{path}: the exported model is off by {error:.2e}, where PyTorch's outputs reach {largest:.2e}; "
                f"expected a relative difference below {MAX_RELATIVE_ERROR:g}. Nothing was written"
            )
        finish(Path(folder, path.name))
        files = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)  # `path` last
        for file in files:
            flush(file)
            rename_durably(file, path.with_name(file.name))
    written = tuple(path.with_name(file.name) for file in reversed(files))
    return ExportCheck(files=written, max_error=error, max_value=largest)


def _noise(batch_size: int, image_size: tuple[int, int]) -> Tensor:
    return torch.randn(batch_size, 3, *image_size, generator=torch.Generator().manual_seed(0))


def _compare(model: nn.Module, run: Callable[[Tensor], list[Tensor]], image: Tensor) -> tuple[float, float]:
    """Largest difference and largest value of the output that differs most for its size."""
    with torch.no_grad():
        expected, found = tensors_in(model(image)), run(image)
    results = []
    for have, want in zip(found, expected, strict=True):
        if have.shape != want.shape:
            raise ExportError(f"an output has shape {tuple(have.shape)}, in PyTorch {tuple(want.shape)}")
        results.append((float((have - want).abs().max()), float(want.abs().max())))
    return max(results, key=lambda result: result[0] / max(result[1], torch.finfo(torch.float32).tiny))


def _output_names(model: nn.Module) -> list[str] | None:
    if isinstance(model, DensePIIP):
        return [f"stride{stride}" for stride in model.out_strides]
    if isinstance(model, PIIPClassifier):
        return ["logits" if model.num_classes else "features"]
    return None


def tensors_in(value: object) -> list[Tensor]:
    """All tensors of a nested output, in order; anything else in it is left out."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]
