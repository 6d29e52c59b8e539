"""Whole detectors as ONNX files, by Detectron2's tracing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor, nn

from piip_core.export import DEFAULT_OPSET, INPUT, ExportCheck, ExportError, import_runtime, refusing, write_checked


def export_detector(
    model: nn.Module,
    path: Path,
    image: Tensor,
    *,
    opset: int = DEFAULT_OPSET,
    metadata: Mapping[str, str] | None = None,
) -> ExportCheck:
    """Writes a Mask R-CNN, Cascade R-CNN or the like as .onnx, after a comparison of onnxruntime with PyTorch.

    The input is named "image" and float32. The outputs, of N objects, are "boxes" (N, 4) in its pixels (x0, y0, x1,
    y1), "scores" (N,), "classes" (N,) and, of a model with masks, "masks" (N, 1, side, side), probabilities in boxes.

    Args:
        model: A `GeneralizedRCNN` of Detectron2 on the CPU in float32. It is set to evaluation mode.
        path: File to write; weights beyond 2 GB go to further ones beside it.
        image: An example with detections, (3, H, W) as the model takes it: resized, 0 to 255, not normalised.
            Its size becomes that of all images.
        opset: ONNX operator set, 16 (the first whose RoiAlign is aligned) to 20.
        metadata: What to note in the file.

    Raises:
        ExportError: If the model is another, nothing is found in the image, a package is missing, or the file computes
            something else.
    """
    if not isinstance(model, GeneralizedRCNN):
        raise ExportError(f"{type(model).__name__}: expected a GeneralizedRCNN; others export their backbone alone")
    image = image.float()
    adapter = TracingAdapter(model, [{"image": image}], _detect).eval()
    with torch.no_grad():
        found = adapter(image)
    if not len(found[0]):
        raise ExportError("nothing is found in the image: expected one with objects, to trace and to compare")

    def write(file: Path) -> Callable[[Tensor], list[Tensor]]:
        open_onnx = import_runtime(opset)
        import onnx

        names = ["boxes", "scores", "classes", "masks"][: len(found)]
        with warnings.catch_warnings(), refusing(f"{type(model).__name__} at {image.shape[1]} x {image.shape[2]}"):
            warnings.simplefilter("ignore")  # of each size that becomes a constant
            torch.onnx.export(
                adapter, (image,), file, dynamo=False, opset_version=opset, input_names=[INPUT], output_names=names
            )
        content = onnx.load(file, load_external_data=False)
        onnx.helper.set_model_props(content, dict(metadata or {}))
        onnx.save(content, file)
        return open_onnx(file)

    return write_checked(adapter, path, image, write)


def _detect(model: GeneralizedRCNN, inputs: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
    (found,) = model.inference(inputs, do_postprocess=False)
    masks = (found.pred_masks,) if found.has("pred_masks") else ()
    return found.pred_boxes.tensor, found.scores, found.pred_classes, *masks
