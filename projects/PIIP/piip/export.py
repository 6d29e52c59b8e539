"""Whole detectors as ONNX files, by Detectron2's tracing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor, nn

from piip_core.export import DEFAULT_OPSET, INPUT, ExportCheck, ExportError, import_runtime, write_checked


def export_detector(
    model: nn.Module,
    path: Path,
    image_size: tuple[int, int],
    *,
    opset: int = DEFAULT_OPSET,
    metadata: Mapping[str, str] | None = None,
) -> ExportCheck:
    """Writes a Mask R-CNN or the like as an .onnx file, after a comparison of onnxruntime's results with PyTorch's.

    The input "image" is (3, H, W) float32, as the model's data mapper makes it: 0 to 255, resized, not normalised. The
    outputs are "boxes" (N, 4) in pixels of that image, x0, y0, x1, y1, "scores" (N,), "classes" (N,) and, of a model
    with masks, "masks" (N, 1, side, side), probabilities inside each box.

    Args:
        model: A `GeneralizedRCNN` of Detectron2 on the CPU in float32. It is set to evaluation mode.
        path: File to write.
        image_size: Height and width, fixed in the file.
        opset: ONNX operator set, 16 (the first whose RoiAlign is aligned) or later.
        metadata: What to note in the file.

    Raises:
        ExportError: If the model is another, a package is missing, or the file computes something else.
    """
    if not isinstance(model, GeneralizedRCNN):
        raise ExportError(f"{type(model).__name__}: expected a GeneralizedRCNN; others export their backbone alone")
    image = torch.rand(3, *image_size, generator=torch.Generator().manual_seed(0)) * 255
    adapter = TracingAdapter(model, [{"image": image}], _detect).eval()
    names = ["boxes", "scores", "classes", "masks"][: len(adapter(image))]

    def write(file: Path) -> Callable[[Tensor], list[Tensor]]:
        open_onnx = import_runtime()
        import onnx

        torch.onnx.export(
            adapter, (image,), file, dynamo=False, opset_version=opset, input_names=[INPUT], output_names=names
        )
        content = onnx.load(file)
        onnx.helper.set_model_props(content, dict(metadata or {}))
        onnx.save(content, file)
        return open_onnx(file)

    return write_checked(adapter, path, image, write)


def _detect(model: GeneralizedRCNN, inputs: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
    (found,) = model.inference(inputs, do_postprocess=False)
    masks = (found.pred_masks,) if found.has("pred_masks") else ()
    return found.pred_boxes.tensor, found.scores, found.pred_classes, *masks
