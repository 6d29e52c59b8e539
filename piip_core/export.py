"""Models as files that run without this project: `torch.export` programs and ONNX, checked against PyTorch.

The deformable-attention operator is replaced by standard operators (its PyTorch reference: `grid_sample`, which is
ONNX's GridSample), so that any runtime takes the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .classifier import PIIPClassifier
from .errors import UserError
from .files import flush, rename_durably
from .ops import deform_attn_grid_reference, ms_deform_attn_reference
from .pyramid import DensePIIP

__all__ = [
    "ExportCheck",
    "ExportError",
    "export_onnx",
    "export_program",
    "save_program",
    "tensors_in",
    "without_operator",
]

logger = logging.getLogger(__name__)

MIN_OPSET, DEFAULT_OPSET = 16, 18
# ONNX files are protocol buffers, which end at 2 GB; beyond this the weights get a file of their own
MAX_BYTES_INSIDE = 1_500_000_000
INPUT = "image"


class ExportError(UserError):
    """A model cannot be exported, or the exported one computes something else."""


@dataclass(frozen=True, kw_only=True)
class ExportCheck:
    """How far a written file is from PyTorch, on a random image.

    Attributes:
        files: What was written; the first one is what a runtime opens.
        max_error: Largest absolute difference of an output.
        max_value: Largest absolute value of that output, for scale.
    """

    files: tuple[Path, ...]
    max_error: float
    max_value: float

    @property
    def relative_error(self) -> float:
        """Largest difference over the largest value."""
        return self.max_error / max(self.max_value, torch.finfo(torch.float32).tiny)

    def __str__(self) -> str:
        size = sum(file.stat().st_size for file in self.files) / 1e6
        names = ", ".join(map(str, self.files))
        return (
            f"{names}: {size:.1f} MB; largest difference from PyTorch {self.max_error:.2e}, where outputs reach "
            f"{self.max_value:.2e}"
        )


def export_program(model: nn.Module, image_size: tuple[int, int], *, batch_size: int | None = None) -> ExportedProgram:
    """The model as a `torch.export` program of standard operators only.

    Args:
        model: `PIIPClassifier`, `DensePIIP` or another module that takes one float32 image (B, 3, H, W). It is exported
            in evaluation mode.
        image_size: Height and width, fixed in the program.
        batch_size: Images per call; None leaves it open.

    Raises:
        ExportError: If the model cannot be traced.
    """
    height, width = image_size
    logger.info("tracing (a published model takes minutes)")
    # An example of one image would make programs of exactly one
    example = torch.zeros(batch_size or 2, 3, height, width)
    shapes = ({0: Dim("batch", min=1)} if batch_size is None else None,)
    with _evaluating(model), torch.no_grad():
        try:
            program = torch.export.export(model, (example,), dynamic_shapes=shapes)
        except (RuntimeError, ValueError) as error:
            raise ExportError(
                f"{type(model).__name__} at {height} x {width} cannot be exported ({_first_line(error)})"
            ) from error
    logger.info("replacing the operator by standard ones")
    program = without_operator(program)
    _round_scales_up(program)
    return program


def without_operator(program: ExportedProgram) -> ExportedProgram:
    """The program with this project's operators decomposed into standard ones; it needs nothing of this project."""
    return program.run_decompositions(
        {
            torch.ops.piip.deform_attn_grid.default: deform_attn_grid_reference,
            torch.ops.piip.ms_deform_attn.default: ms_deform_attn_reference,
        }
    )


def _round_scales_up(program: ExportedProgram) -> None:
    """Makes resizing factors float32, as ONNX has them, without losing a pixel.

    A side becomes floor(side * factor): 368 times float32(192 / 368) is 191.99999, times the next number 192.
    """
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.upsample_bilinear2d.vec and node.args[3] is not None:
            node.args = (*node.args[:3], [_float32_from(factor) for factor in node.args[3]])


def _float32_from(value: float) -> float:
    """The smallest float32 that is not below the value."""
    rounded = np.float32(value)
    # as Python numbers: numpy would compare in float32
    return float(rounded if float(rounded) >= value else np.nextafter(rounded, np.float32(np.inf)))


def save_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    image_size: tuple[int, int],
    *,
    batch_size: int | None = None,
    program: ExportedProgram | None = None,
    rtol: float = 1e-3,
) -> ExportCheck:
    """Writes a .pt2 file for `torch.export.load`, after a comparison of what it computes.

    Args:
        model: As for `export_program`, on the CPU in float32.
        path: File to write.
        image_size: As for `export_program`.
        batch_size: As for `export_program`.
        program: What `export_program` made of the model with these sizes; None to make it.
        rtol: Largest difference from PyTorch that passes, relative to the largest output.

    Raises:
        ExportError: If the model cannot be exported, or computes something else when loaded; then no file is left.
    """
    path = Path(path)
    _check_model(model)
    program = program or export_program(model, image_size, batch_size=batch_size)
    with _folder_beside(path) as folder:
        torch.export.save(program, folder / path.name)
        loaded = torch.export.load(folder / path.name).module()
        check = _compare(model, lambda image: tensors_in(loaded(image)), image_size, batch_size)
        return _publish(folder, path, check, rtol)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    image_size: tuple[int, int],
    *,
    batch_size: int | None = None,
    opset: int = DEFAULT_OPSET,
    metadata: Mapping[str, str] | None = None,
    program: ExportedProgram | None = None,
    rtol: float = 1e-3,
) -> ExportCheck:
    """Writes an .onnx file, after a comparison of onnxruntime's results with PyTorch's.

    The input is named "image", the outputs "logits" (classifier) or "stride4", "stride8" ... (backbone).

    Args:
        model: As for `export_program`, on the CPU in float32.
        path: File to write; the weights of a large model go to a second one beside it, `path` with ".data" at its end.
        image_size: As for `export_program`.
        batch_size: As for `export_program`.
        opset: ONNX operator set, 16 (the first with GridSample) or later.
        metadata: What to note in the file.
        program: As for `save_program`.
        rtol: As for `save_program`.

    Raises:
        ExportError: As for `save_program`, or if a package is missing.
    """
    path = Path(path)
    if opset < MIN_OPSET:
        raise ExportError(f"opset={opset}: expected {MIN_OPSET} or later, the first with GridSample")
    _check_model(model)
    for package in ("onnxscript", "onnxruntime"):
        _require(package)
    program = program or export_program(model, image_size, batch_size=batch_size)
    logger.info("translating to ONNX")
    with _quiet():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=[INPUT],
            output_names=_output_names(model),
            dynamic_shapes=({0: "batch"},) if batch_size is None else None,
            verbose=False,
        )
    onnx_program.model.metadata_props.update(metadata or {})
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    with _folder_beside(path) as folder:
        onnx_program.save(folder / path.name, external_data=size > MAX_BYTES_INSIDE)
        del onnx_program
        check = _compare(model, _in_onnxruntime(folder / path.name), image_size, batch_size)
        return _publish(folder, path, check, rtol)


def _in_onnxruntime(path: Path) -> Callable[[Tensor], list[Tensor]]:
    session = _require("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: [torch.from_numpy(found) for found in session.run(None, {INPUT: image.numpy()})]


def _compare(
    model: nn.Module,
    run: Callable[[Tensor], Sequence[Tensor]],
    image_size: tuple[int, int],
    batch_size: int | None,
) -> ExportCheck:
    """The output with the largest relative difference, on noise; an open batch gets another size than the example."""
    logger.info("comparing with PyTorch")
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch_size or 1, 3, *image_size, generator=generator)
    with _evaluating(model), torch.no_grad():
        expected, found = tensors_in(model(image)), run(image)
    checks = []
    for have, want in zip(found, expected, strict=True):
        if have.shape != want.shape:
            raise ExportError(f"an output has shape {tuple(have.shape)}, in PyTorch {tuple(want.shape)}")
        error, largest = float((have - want).abs().max()), float(want.abs().max())
        checks.append(ExportCheck(files=(), max_error=error, max_value=largest))
    return max(checks, key=lambda check: check.relative_error)


def _publish(folder: Path, path: Path, check: ExportCheck, rtol: float) -> ExportCheck:
    """Renames the files in the folder into place, `path` last, if they passed."""
    if not check.relative_error <= rtol:  # NaN does not pass
        raise ExportError(
            f"{path}: the exported model is off by {check.max_error:.2e}, where PyTorch's outputs reach "
            f"{check.max_value:.2e}; expected a relative difference below {rtol:g}. Nothing was written"
        )
    files = sorted(folder.iterdir(), key=lambda file: file.name == path.name)
    for file in files:
        flush(file)
        rename_durably(file, path.with_name(file.name))
    return dataclasses.replace(check, files=tuple(path.with_name(file.name) for file in reversed(files)))


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A folder for files that know each other's names, on the disk of their destination."""
    if not path.parent.is_dir():
        raise ExportError(f"{path}: there is no folder {path.parent}; make it, or name another file")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".incomplete", dir=path.parent) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch.onnx's remarks on its own insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check_model(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ExportError(
                f"{name} is {parameter.dtype} on {parameter.device}: expected float32 on the CPU (model.float().cpu())"
            )


def _output_names(model: nn.Module) -> list[str] | None:
    if isinstance(model, DensePIIP):
        return [f"stride{stride}" for stride in model.out_strides]
    if isinstance(model, PIIPClassifier):
        return ["logits" if model.num_classes else "features"]
    return None


def _require(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ExportError(f"ONNX export needs the package {package}: pip install onnx onnxscript onnxruntime") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def tensors_in(value: object) -> list[Tensor]:
    """All tensors of a nested output, in order; anything else in it is left out."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]
